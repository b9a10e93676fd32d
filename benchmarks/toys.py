"""Does each objective learn perfect control where it is possible, and is ExMATE better than CLM where attributes are entangled?

A toy world (toy_world.py) and a tiny Llama (toy_model.py). On a validation world CLM's number of epochs is chosen, then
ExMATE's weight at that number; both by control error. Then, seed by seed, both objectives start from the same model and see
the same examples in the same order. Writes `results/toys.json` and, out of it, `docs/toys.md`.

    python -m benchmarks.toys            # all of it, some 15 minutes on one core
    python -m benchmarks.toys --page     # the text anew, from the stored results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.common import RESULTS, figure, store
from benchmarks.toy_model import ToyBench, ToyRecipe
from benchmarks.toy_world import ATTRIBUTES, FAVOURITE, ToyWorld, perfect_error
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
LEAST_SPEARMAN, LEAST_PAIRWISE = 0.95, 0.9
MEASURES = {
    "control_error": "control error, MAE in levels",
    "pairwise": "pairwise order accuracy",
    "own_slope": "slope of the own attribute",
    "off_diagonal": "slope of the other attribute, absolute",
    "favourites": "share of the prompt's favourite words",
}
Row = dict[str, Any]


def measure(bench: ToyBench, objective: config.Objective, epochs: int) -> Row:
    """Train, sample the grid, and take means over the two attributes."""
    found = bench.judged(bench.grid(bench.trained(objective, epochs), objective.type, samples=2))
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
    facts = {"entanglement": bench.world.entanglement, "seed": bench.world.seed, "examples": len(bench.examples())}
    facts |= {"epochs": epochs, "method": objective.type, "weight": objective.weight}
    row = facts | {k: round(float(v), 4) for k, v in values.items()} | {"slopes": slopes.round(4).tolist()}
    print(json.dumps(row), flush=True)
    return row


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


def pairs(rows: Sequence[Row], **where: Any) -> list[tuple[Row, Row]]:
    """CLM's and ExMATE's rows of the same seed, among those that match."""
    chosen = [r for r in rows if all(r[k] == v for k, v in where.items())]
    by_seed = {m: {r["seed"]: r for r in chosen if r["method"] == m} for m in ("clm", "exmate")}
    return [(by_seed["clm"][seed], by_seed["exmate"][seed]) for seed in sorted(by_seed["clm"])]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95% t interval."""
    mean, half = float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return mean, mean - half, mean + half


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


def page(results: dict[str, Any]) -> str:
    """`docs/toys.md`: every number and every verdict in it comes from the results."""
    epochs, weight, rows = results["epochs"], results["weight"], results["runs"]
    longer, shorter = (pairs(rows, part="balanced", entanglement=ENTANGLEMENT, epochs=n) for n in (epochs, epochs // 2))
    unbalanced = pairs(rows, part="unbalanced")
    parts = [
        "# Toy worlds: what each objective learns where perfect control is known",
        "Generated by `python -m benchmarks.toys`; the numbers are in `benchmarks/results/toys.json`.",
        _world_text(),
        "## An independent pair",
        _independent(rows),
        "## The choice of w and of the length of training",
        f"On one validation world (seed {VALIDATION_SEED}, entanglement {ENTANGLEMENT}), by control error: first CLM's epochs, "
        f"then ExMATE's w at that number. Chosen: **{epochs} epochs, w = {weight:g}**. That world serves for nothing else.",
        _choice_table(results["validation"]),
        f"## ExMATE against CLM at entanglement {ENTANGLEMENT}",
        f"Same starting model, same examples, same order; {len(longer)} seeds, each a world of its own. Brackets are 95% t "
        "intervals over seeds, those of the difference over pairs.",
        f"### {epochs} epochs, balanced examples",
        _comparison(longer),
        f"### {epochs // 2} epochs, balanced examples",
        _comparison(shorter),
        _same_passes(shorter, longer),
        f"### {epochs} epochs, examples as the pool has them (`strategy: none`)",
        "Balancing takes the correlation out of the examples before any objective sees them; here it is left in.",
        _comparison(unbalanced),
        "## Over entanglements",
        f"Balanced examples, {epochs // 2} epochs, the w chosen above. Balancing leaves fewer examples as entanglement grows, so "
        "the rows differ in scarcity too.",
        _sweep_table(rows, epochs // 2),
        "What this does not show: the toy has 24 words and short answers, all weights train, and w was chosen on one world. "
        "Neither sign nor size of a difference need hold for a chat model; the intervals are over worlds of this one kind.",
    ]
    return "\n\n".join(parts) + "\n"


def _world_text() -> str:
    return (
        "A toy answer has 18 words; the attributes are the shares of red and of blue words, five levels each. In the pool the "
        "two correlate positively by the world's *entanglement*, and every combination occurs. Perfect control is known: an "
        f"answer at the requested levels, like the pool's, has a control error of {perfect_error(5):g}, pairwise order accuracy "
        f"1, slopes 1 and 0, and {FAVOURITE:g} of its words are the ones that its prompt favours. A two-layer Llama from scratch "
        "learns the pool without codes, then the distilled examples with codes, through the same distillation, rows, Learner "
        "and metrics as a job; it is sampled at temperature 1 on 32 held-out prompts at all 25 settings, twice each."
    )


def _independent(rows: Sequence[Row]) -> str:
    lines = ["| objective | Spearman over level means, least | pairwise order accuracy, least |", "|---|---|---|"]
    for method, name in (("clm", "CLM"), ("exmate", "ExMATE")):
        own = [r for r in rows if r["part"] == "independent" and r["method"] == method]
        lines.append(f"| {name} | {min(r['least_spearman'] for r in own):.3f} | {min(r['least_pairwise'] for r in own):.3f} |")
        examples = round(np.mean([r["examples"] for r in own]))
    head = f"Entanglement 0, {examples} examples, {INDEPENDENT_EPOCHS} epochs; least of both attributes and {len(own)} seeds. "
    return head + f"Asked for are {LEAST_SPEARMAN} and {LEAST_PAIRWISE}.\n\n" + "\n".join(lines)


def _choice_table(tried: Sequence[Row]) -> str:
    lines = ["| objective | w | epochs | control error | pairwise | other's slope, absolute |", "|---|---|---|---|---|---|"]
    for r in tried:
        name, w = ("CLM", "–") if r["method"] == "clm" else ("ExMATE", f"{r['weight']:g}")
        values = " | ".join(f"{r[k]:.3f}" for k in ("control_error", "pairwise", "off_diagonal"))
        lines.append(f"| {name} | {w} | {r['epochs']} | {values} |")
    return "\n".join(lines)


def _comparison(together: Sequence[tuple[Row, Row]]) -> str:
    """Measures with their intervals, what these say, and the mean slope matrices."""
    lines = ["| | CLM | ExMATE | ExMATE − CLM |", "|---|---|---|---|"]
    for key, name in MEASURES.items():
        columns = ([c[key] for c, _ in together], [e[key] for _, e in together], [e[key] - c[key] for c, e in together])
        lines.append(f"| {name} | " + " | ".join(_shown(c) for c in columns) + " |")
    slopes = "Mean slope matrices (row: the dial that is turned, column: the attribute that moves; perfect: 1 and 0):"
    return "\n\n".join(["\n".join(lines), _verdicts(together), slopes, _slope_table(together)])


def _slope_table(together: Sequence[tuple[Row, Row]]) -> str:
    lines = [f"| | {' | '.join(f'{m}: {a}' for m in ('CLM', 'ExMATE') for a in ATTRIBUTES)} |", "|---|---|---|---|---|"]
    means = np.array([[c["slopes"], e["slopes"]] for c, e in together]).mean(axis=0)  # [method, dial, attribute]
    for i, dial in enumerate(ATTRIBUTES):
        lines.append(f"| {dial} dial | " + " | ".join(f"{v:.3f}" for v in means[:, i].ravel()) + " |")
    return "\n".join(lines)


def _sweep_table(rows: Sequence[Row], epochs: int) -> str:
    keys = {"control_error": "error", "pairwise": "pairwise", "off_diagonal": "other's slope"}
    heads = [f"{m} {short}" for short in keys.values() for m in ("CLM", "ExMATE")]
    lines = ["| entanglement | seeds | examples | " + " | ".join(heads) + " | error, ExMATE − CLM |", "|---" * 10 + "|"]
    for entanglement in sorted({r["entanglement"] for r in rows}):
        together = pairs(rows, part="balanced", entanglement=entanglement, epochs=epochs)
        means = [f"{np.mean([pair[m][k] for pair in together]):.3f}" for k in keys for m in (0, 1)]
        examples = round(np.mean([c["examples"] for c, _ in together]))
        difference = _shown([e["control_error"] - c["control_error"] for c, e in together])
        lines.append(f"| {entanglement:g} | {len(together)} | {examples} | {' | '.join(means)} | {difference} |")
    return "\n".join(lines)


def _verdicts(together: Sequence[tuple[Row, Row]]) -> str:
    """One sentence per measure, by whether the interval of the difference leaves out zero."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "not shown to differ": []}
    for key, name in MEASURES.items():
        _, low, high = mean_interval([e[key] - c[key] for c, e in together])
        groups["lower" if high < 0 else "higher" if low > 0 else "not shown to differ"].append(name)
    return " ".join(f"Under ExMATE {word}: {'; '.join(names)}." for word, names in groups.items() if names)


def _same_passes(shorter: Sequence[tuple[Row, Row]], longer: Sequence[tuple[Row, Row]]) -> str:
    differences = [e["control_error"] - c["control_error"] for (_, e), (c, _) in zip(shorter, longer, strict=True)]
    return (
        "ExMATE passes each answer twice, under its own and under a wrong code, so half the epochs cost about as much as CLM's "
        f"whole: its control error at half minus CLM's at the whole is {_shown(differences)}."
    )


def _shown(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


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
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(json.loads((RESULTS / "toys.json").read_text())))


if __name__ == "__main__":
    main()
