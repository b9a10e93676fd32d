"""Does each advantage estimator learn a dial by reinforcement alone, and does reinforcement make CLM's dial more accurate?

In the worlds of toys.py. From random weights every estimator has to learn an independent pair: no pool, no codes, nothing but
rewards. Then, on the validation world, an estimator and its rate are chosen by control error after CLM; with these, seed by
seed, reinforcement goes on from the CLM model of toys.py, held near it by a KL. Writes `results/toys_ppo.json` and, out of it,
the second half of `docs/toys.md`.

    python -m benchmarks.toys_ppo            # all of it, some 15 minutes of one core
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.common import RESULTS, figure, store
from benchmarks.toy_model import ToyBench, toy_network
from benchmarks.toy_page import LEAST_SPEARMAN, MEASURES, Row, mean_interval, pairs
from benchmarks.toy_policy import SAMPLING, reinforced
from benchmarks.toy_ppo_page import ESTIMATORS
from benchmarks.toy_world import ToyWorld
from benchmarks.toys import ENTANGLEMENT, SEEDS, VALIDATION_SEED, judged, write_page
from ctrlray import config
from ctrlray.quiet import quiet_libraries, quiet_transformers

STEPS = 120
SCRATCH_RATE, SCRATCH_SEEDS = 4e-3, range(3)
RATES = (1e-3, 2e-3, 4e-3)
KL_COEFFICIENT = 0.05


def objective(advantage: str, rate: float, kl: float, steps: int = STEPS, prompts: int = 8) -> config.PPO:
    """Steps of `prompts` x 4 settings x 8 answers, one update each."""
    return config.PPO(
        steps=steps,
        prompts_per_step=prompts,
        settings_per_prompt=4,
        group_size=8,
        sampling=SAMPLING,
        advantage=advantage,
        learning_rate=rate,
        kl=config.KL(coefficient=kl),
        critic=config.Critic(learning_rate=4e-3),
    )


def measure(part: str, bench: ToyBench, wanted: config.PPO, start: LlamaForCausalLM) -> Row:
    """Train on from `start`, and judge what it became."""
    network, curves = reinforced(bench, wanted, start)
    facts = {"part": part, "entanglement": bench.world.entanglement, "seed": bench.world.seed, "method": wanted.advantage}
    facts |= {"steps": wanted.steps, "rate": wanted.learning_rate, "kl_coefficient": wanted.kl.coefficient}
    rewards = {"first_reward": curves[0]["reward"], "last_reward": curves[-1]["reward"], "kl": curves[-1]["kl"]}
    row = facts | {k: round(v, 4) for k, v in rewards.items()} | judged(bench, network, wanted.advantage)
    print(json.dumps(row), flush=True)
    return row


def from_random_weights() -> list[Row]:
    """Every estimator on an independent pair."""
    rows = []
    for seed in SCRATCH_SEEDS:
        bench = ToyBench(ToyWorld(seed))
        start = toy_network(bench.world, bench.recipe.hidden)
        rows += [measure("scratch", bench, objective(e, SCRATCH_RATE, 0.0), start) for e in ESTIMATORS]
    return rows


def choose(epochs: int) -> tuple[str, float, list[Row]]:
    """The estimator and the rate with the least control error after CLM, and all that was tried."""
    bench = ToyBench(ToyWorld(VALIDATION_SEED, ENTANGLEMENT))
    start = bench.trained(config.CLM(), epochs)
    tried = [measure("validation", bench, objective(e, rate, KL_COEFFICIENT), start) for e in ESTIMATORS for rate in RATES]
    best = min(tried, key=lambda r: float(r["control_error"]))
    return best["method"], best["rate"], tried


def after_clm(epochs: int, advantage: str, rate: float) -> list[Row]:
    """CLM's model and what reinforcement makes of it, seed by seed."""
    rows = []
    for seed in SEEDS:
        bench = ToyBench(ToyWorld(seed, ENTANGLEMENT))
        start = bench.trained(config.CLM(), epochs)
        facts = {"part": "after", "entanglement": ENTANGLEMENT, "seed": seed, "method": "clm", "epochs": epochs}
        rows += [facts | judged(bench, start, "clm"), measure("after", bench, objective(advantage, rate, KL_COEFFICIENT), start)]
    return rows


def run() -> dict[str, Any]:
    """From random weights, the choice, and after CLM."""
    epochs = json.loads((RESULTS / "toys.json").read_text())["epochs"]
    scratch = from_random_weights()
    advantage, rate, tried = choose(epochs)
    runs = scratch + after_clm(epochs, advantage, rate)
    return {"advantage": advantage, "rate": rate, "epochs": epochs, "validation": tried, "runs": runs}


def figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's two bounds, and what the lower error costs."""
    found = []
    for method, name in ESTIMATORS.items():
        values = [r["least_spearman"] for r in results["runs"] if r["part"] == "scratch" and r["method"] == method]
        label = f"independent pair from random weights, {name}: least Spearman over level means of the two attributes, worst seed"
        spread = [min(values), max(values)]
        found.append(figure(label, f">= {LEAST_SPEARMAN}", min(values), min(values) >= LEAST_SPEARMAN, spread))
    together = pairs(results["runs"], ("clm", results["advantage"]), part="after")
    for key, name in MEASURES.items():
        mean, low, high = mean_interval([after[key] - before[key] for before, after in together])
        label = f"entanglement {ENTANGLEMENT}, {ESTIMATORS[results['advantage']]} after CLM minus CLM: {name}"
        target, met = ("< 0, interval excluding 0", high < 0) if key == "control_error" else ("recorded", None)
        found.append(figure(label, target, round(mean, 4), met, [round(low, 4), round(high, 4)]))
    found.append(_kl_figure([after["kl"] for _, after in together]))
    return found


def _kl_figure(values: Sequence[float]) -> dict[str, Any]:
    mean, low, high = mean_interval(values)
    return figure("KL to the CLM model, nats per answer", "recorded", round(mean, 4), None, [round(low, 4), round(high, 4)])


def main() -> None:
    """Run, store, write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    quiet_libraries()
    quiet_transformers()
    torch.set_num_threads(1)
    results = run()
    print(store("toys_ppo", figures(results), **results))
    write_page()


if __name__ == "__main__":
    main()
