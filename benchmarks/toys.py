"""Do CLM and ExMATE learn perfect control where it is possible, and is ExMATE better where attributes are entangled?

A toy world (toy_world.py) and a tiny Llama (toy_model.py). On a validation world CLM's number of epochs is chosen, then
ExMATE's weight at that number; both by control error. Then, seed by seed, both objectives start from the same model and see
the same examples in the same order. Writes `results/toys.json` and, out of it, `docs/toys.md`.

    python -m benchmarks.toys            # all of it, some 8 minutes of one core
    python -m benchmarks.toys --page     # the text anew, from the stored results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.common import RESULTS, figure, store
from benchmarks.toy_model import ToyBench, ToyRecipe
from benchmarks.toy_page import LEAST_PAIRWISE, LEAST_SPEARMAN, MEASURES, Row, mean_interval, page, pairs
from benchmarks.toy_ppo_page import section
from benchmarks.toy_world import ToyWorld
from ctrlray import config

PAGE = Path(__file__).parent.parent / "docs" / "toys.md"
ENTANGLEMENT = 0.6
SEEDS = range(5)
SWEEP, SWEEP_SEEDS = (0.0, 0.3, 0.9), range(3)
VALIDATION_SEED = 1000
EPOCHS = (8, 16, 32)
WEIGHTS = (0.05, 0.3, 1.0, 2.0, 4.0)
INDEPENDENT, INDEPENDENT_EPOCHS = ToyRecipe(max_examples=1500), 12
"""Settings at which an independent pair must be learned; tests/toys holds one seed to the same bounds."""


def measure(bench: ToyBench, objective: config.Likelihood, epochs: int) -> Row:
    """Train, and judge what it became."""
    facts = {"entanglement": bench.world.entanglement, "seed": bench.world.seed, "examples": len(bench.examples())}
    facts |= {"epochs": epochs, "method": objective.type, "weight": objective.weight}
    row = facts | judged(bench, bench.trained(objective, epochs), objective.type)
    print(json.dumps(row), flush=True)
    return row


def judged(bench: ToyBench, network: LlamaForCausalLM, method: str) -> Row:
    """Sample the grid, and take means over the two attributes."""
    found = bench.judged(bench.grid(network, method, samples=2))
    each = list(found["attributes"].values())
    slopes = np.array([[entry["value"] for entry in row] for row in found["slopes"]])
    values = {
        "control_error": np.mean([a["mae"]["value"] for a in each]),
        "pairwise": np.mean([a["pairwise"]["value"] for a in each]),
        "least_pairwise": min(a["pairwise"]["value"] for a in each),
        "least_spearman": min(a["spearman_level_means"]["value"] for a in each),
        "own_slope": np.diag(slopes).mean(),
        "off_diagonal": np.abs(slopes[~np.eye(len(slopes), dtype=bool)]).mean(),
        "favourites": found["favourites"],
        "finished": found["finished"],
    }
    return {k: round(float(v), 4) for k, v in values.items()} | {"slopes": slopes.round(4).tolist()}


def choose() -> tuple[int, float, list[Row]]:
    """CLM's epochs, ExMATE's weight at that number, and all rows tried; on a world that serves for nothing else."""
    bench = ToyBench(ToyWorld(VALIDATION_SEED, ENTANGLEMENT))
    tried = [measure(bench, config.CLM(), epochs) for epochs in EPOCHS]
    best = _least_error(tried)["epochs"]
    weighted = [measure(bench, config.ExMATE(weight=weight), best) for weight in WEIGHTS]
    return best, _least_error(weighted)["weight"], tried + weighted


def compare(
    part: str,
    entanglement: float,
    seeds: Iterable[int],
    epochs: Iterable[int],
    weight: float,
    recipe: ToyRecipe | None = None,
) -> list[Row]:
    """Both objectives on the same worlds; `part` names the rows for the page."""
    benches = [ToyBench(ToyWorld(seed, entanglement), recipe or ToyRecipe()) for seed in seeds]
    objectives = (config.CLM(), config.ExMATE(weight=weight))
    return [{"part": part} | measure(bench, o, count) for bench in benches for count in epochs for o in objectives]


def run() -> dict[str, Any]:
    """The choice, the comparison at two lengths of training, without balancing, an independent pair, and over entanglements."""
    epochs, weight, tried = choose()
    rows = compare("balanced", ENTANGLEMENT, SEEDS, (epochs, epochs // 2), weight)
    rows += compare("unbalanced", ENTANGLEMENT, SEEDS, [epochs], weight, ToyRecipe(strategy="none"))
    rows += compare("independent", 0.0, SWEEP_SEEDS, [INDEPENDENT_EPOCHS], weight, INDEPENDENT)
    for entanglement in SWEEP:
        rows += compare("balanced", entanglement, SWEEP_SEEDS, [epochs // 2], weight)
    return {"epochs": epochs, "weight": weight, "validation": tried, "runs": rows}


def figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's two bounds on an independent pair, and the recorded differences."""
    found = []
    for method in ("clm", "exmate"):
        for key, bound in (("least_spearman", LEAST_SPEARMAN), ("least_pairwise", LEAST_PAIRWISE)):
            values = [r[key] for r in results["runs"] if r["part"] == "independent" and r["method"] == method]
            name = f"independent pair, {method}: {key.replace('_', ' ')} of the two attributes, worst seed"
            found.append(figure(name, f">= {bound}", min(values), min(values) >= bound, [min(values), max(values)]))
    together = pairs(results["runs"], part="balanced", entanglement=ENTANGLEMENT, epochs=results["epochs"])
    for key, name in MEASURES.items():
        mean, low, high = mean_interval([e[key] - c[key] for c, e in together])
        label = f"entanglement {ENTANGLEMENT}, ExMATE minus CLM: {name}"
        found.append(figure(label, "recorded", round(mean, 4), None, [round(low, 4), round(high, 4)]))
    return found


def _least_error(rows: Iterable[Row]) -> Row:
    return min(rows, key=lambda r: r["control_error"])


def main() -> None:
    """Run, store, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the page, from the stored results")
    if not parser.parse_args().page:
        torch.set_num_threads(1)
        results = run()
        print(store("toys", figures(results), **results))
    write_page()


def write_page() -> None:
    """The text, from what this benchmark and toys_ppo stored."""
    toys, toys_ppo = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("toys", "toys_ppo"))
    PAGE.write_text(page(toys) + section(toys_ppo))


if __name__ == "__main__":
    main()
