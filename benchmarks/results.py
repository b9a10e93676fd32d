"""Every method on the same HH prompts (jobs/results), CLM and ExMATE over training seeds: does the dial do what the paper says?

The sweep runs whole in a process of its own under `--root`, resumed when interrupted. The models of several training seeds count
as one method: each is compared with itself alone, prompt by prompt, and intervals resample prompts, which all seeds share. At the
end the section of docs/results.md is written anew (see results_page).

    python -m benchmarks.results --root /data/ctrlray-results      # CTRLRAY_DATA holds hh/ and prompts/
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import results_page
from benchmarks.common import figure, store
from ctrlray import config, schema
from ctrlray.control import ControlSpace
from ctrlray.metrics.bootstrap import Interval
from ctrlray.metrics.compare import compare_grid, holm
from ctrlray.metrics.drift import kl_by_method
from ctrlray.metrics.entanglement import relative_to_pool
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.metrics.rows import MODEL
from ctrlray.pipeline import STAGES, Run
from ctrlray.stages.judging import as_judged
from ctrlray.stages.questions import DRIFT, RERANKING, answers_schema, samples
from ctrlray.sweep.plan import load

SWEEP = Path(__file__).parent.parent / "jobs" / "results" / "sweep.yaml"
DRAWS = 2000
FIRST, METHOD = "base", "exmate"
PAIRWISE = {"training reward": 0.70, "judge": 0.60}
SPEARMAN = 0.9


def together(runs: list[Run]) -> pa.Table:
    """The grids of all seeds in one."""
    grids = [grid_of(run) for run in runs]
    return pa.concat_tables([g.append_column(MODEL, pa.array([seed] * len(g), pa.int32())) for seed, g in enumerate(grids)])


def grid_of(run: Run) -> pa.Table:
    """A run's answers with both kinds of scores."""
    return run.out("evaluate").read_table("grid", schema.grid([a.name for a in run.job.control.attributes], judged=True))


def rounded(value: dict[str, Any]) -> tuple[float, list[float]]:
    """Value and bounds of an interval."""
    return round(value["value"], 4), [round(value["low"], 4), round(value["high"], 4)]


def control_figures(found: dict[str, Any], regime: str) -> list[dict[str, Any]]:
    """How well ExMATE's answers follow each dial."""
    figures = []
    for name, values in found[METHOD]["attributes"].items():
        if regime == "training reward":
            value, spread = rounded(values["spearman_level_means"])
            figures.append(figure(f"{name}: Spearman over level means", f">= {SPEARMAN}", value, value >= SPEARMAN, spread))
        value, spread = rounded(values["pairwise"])
        aim = PAIRWISE[regime]
        figures.append(figure(f"{name}: pairwise order accuracy, {regime}", f">= {aim}", value, value >= aim, spread))
    return figures


def slope_figures(found: dict[str, Any], pool: list[list[dict[str, float]]], names: list[str]) -> list[dict[str, Any]]:
    """How far ExMATE's dials move each other, beside how the attributes go together in the pool."""
    figures = []
    for i, moved in enumerate(names):
        for j, other in enumerate(names):
            if i != j:
                value, spread = rounded(found[METHOD]["slopes"][i][j])
                limit = round(abs(pool[i][j]["value"]), 4)
                target = f"size <= the pool's {limit}"
                figures.append(figure(f"slope of {other} on {moved}'s dial", target, value, abs(value) <= limit, spread))
    return figures


def against_reranking(judged: list[dict[str, Any]], spent: dict[str, float]) -> list[dict[str, Any]]:
    """ExMATE minus best-of-n in the judge's paired tests, and what n answers cost beside one."""
    figures = []
    for row in judged:
        if {row["first"], row["second"]} == {METHOD, RERANKING} and row["statistic"] == "pairwise":
            sign = 1 if row["first"] == METHOD else -1
            low, high = sorted(round(sign * row[k], 4) for k in ("low", "high"))
            value = round(sign * row["value"], 4)
            name = f"{row['attribute']}: pairwise order accuracy under the judge, ExMATE - reranking"
            figures.append(figure(name, ">= 0", value, value >= 0, [low, high]))
    ratio = spent[RERANKING] / spent[METHOD]
    figures.append(figure("tokens for one request, reranking / ExMATE", ">= 8", round(ratio, 2), ratio >= 8))
    return figures


def tokens_per_request(runs: Sequence[Run]) -> dict[str, float]:
    """Tokens that each method spends on one answer, over all its seeds: reranking's are those of all its candidates."""
    spent, answered, job = Counter[str](), Counter[str](), runs[0].job
    for run in runs:
        spent.update((run.result("evaluate") or {})["facts"]["tokens_spent"])
        answered.update(run.out("evaluate").read_table("answers", answers_schema(run.job), ["method"])["method"].to_pylist())
    return {m: round(n * (samples(m, job) if m == RERANKING else 1) / answered[m], 2) for m, n in spent.items()}


def stages(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """By run, seconds, tokens and rows of its stages; of the later runs those that are not the first one's."""
    first, found = runs[FIRST], {}
    for name, run in runs.items():
        own = [s for s in STAGES if name == FIRST or run.keys[s] != first.keys[s]]
        results = {s: r for s in own if (r := run.result(s)) is not None}
        found[name] = {s: {"seconds": r["seconds"], "tokens": r["tokens"], "rows": r["rows_out"]} for s, r in results.items()}
    return found


def shape(first: Run, seeds: int) -> dict[str, Any]:
    """What was run: sizes, attributes, and over how many seeds each method was trained."""
    job, control = first.job, first.job.control
    trained = {o.type: 1 if o.type == "ppo" else seeds for o in job.train.objectives}
    return {
        "model": job.model.name,
        "attributes": {a.name: a.levels for a in control.attributes},
        "train_prompts": first.prompts("train").num_rows,
        "samples": job.generate.samples,
        "eval_prompts": first.prompts("eval").num_rows,
        "cells": len(ControlSpace.of(control).cells(job.evaluate.levels)),
        "candidates": job.evaluate.candidates,
        "temperature": job.evaluate.sampling.temperature,
        "seeds": dict.fromkeys(job.evaluate.methods, 1) | trained,
    }


def shown(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of each method's metrics what the page shows."""
    kept = ("num_rows", "num_prompts", "num_excluded", "mean_tokens", "finished", "slopes", "entanglement")
    kept += ("pareto", "cosa", "texts")
    wanted = ("spearman_level_means", "pairwise", "mae", "bias")
    made = {}
    for method, found in metrics.items():
        attributes = {
            name: {k: values[k] for k in wanted} | {"pairwise_length_adjusted": values["length_adjusted"]["pairwise"]}
            for name, values in found["attributes"].items()
        }
        made[method] = {k: found[k] for k in kept} | {"attributes": attributes}
    return made


def by_seed(runs: dict[str, Run]) -> dict[str, Any]:
    """Of each run, by regime, method and attribute: pairwise order accuracy and Spearman, without intervals."""
    wanted = ("pairwise", "spearman_level_means")
    found: dict[str, Any] = {}
    for name, run in runs.items():
        job, table = run.job, grid_of(run)
        for regime, grid in (("training reward", table), ("judge", as_judged(table, job))):
            metrics = evaluate_grid(grid, job.control, 1, job.seed)
            found.setdefault(name, {})[regime] = {
                method: {a: {k: values[k]["value"] for k in wanted} for a, values in m["attributes"].items()}
                for method, m in metrics.items()
            }
    return found


def compared(pooled: pa.Table, first: pa.Table, job: config.Job) -> list[dict[str, Any]]:
    """Paired tests over all seeds; PPO is held against the ExMATE that it started from, which is that of the first run."""
    tests, own = (compare_grid(grid, job.control, DRAWS, job.seed) for grid in (pooled, first))

    def place(row: dict[str, Any]) -> tuple[str, ...]:
        return (row["first"], row["second"], row["attribute"], row["statistic"])

    started = {place(r): r for r in own if {r["first"], r["second"]} == {METHOD, "ppo"}}
    tests = [started.get(place(r), r) for r in tests]
    for statistic in dict.fromkeys(r["statistic"] for r in tests):
        family = [r for r in tests if r["statistic"] == statistic]
        for row, adjusted in zip(family, holm([r["p"] for r in family]), strict=True):
            row["p_holm"] = adjusted
    return tests


def beside_the_pool(metrics: dict[str, Any], pool: list[list[dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Each method's entanglement index as a multiple of the data pool's."""
    entries = [[Interval(e["value"], e["low"], e["high"]) for e in row] for row in pool]
    found = {}
    for method, m in metrics.items():
        index = {k: math.nan if v is None else v for k, v in m["entanglement"]["index"].items()}
        found[method] = relative_to_pool(Interval(**index), entries).as_json()
    return found


def measured(runs: dict[str, Run]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The figures with their targets, and all that the page shows beside them; the runs by variant, with `FIRST` among them."""
    first = runs[FIRST]
    job, names = first.job, [a.name for a in first.job.control.attributes]
    grids = (together(list(runs.values())), grid_of(first))
    regimes = {"training reward": grids, "judge": tuple(as_judged(g, job) for g in grids)}
    found = {regime: evaluate_grid(pooled, job.control, DRAWS, job.seed) for regime, (pooled, _) in regimes.items()}
    tests = {regime: compared(*both, job) for regime, both in regimes.items()}
    spent, pool_slopes = tokens_per_request(list(runs.values())), (first.result("distill") or {})["facts"]["pool_slopes"]
    figures = [f for regime, metrics in found.items() for f in control_figures(metrics, regime)]
    figures += [*slope_figures(found["training reward"], pool_slopes, names), *against_reranking(tests["judge"], spent)]
    drift = pa.concat_tables([run.out("evaluate").read_table(DRIFT, schema.drift()) for run in runs.values()])
    evaluated = first.out("evaluate")
    return figures, {
        "shape": shape(first, len(runs)),
        "stages": stages(runs),
        "training": {o.type: (first.result("train") or {})["facts"][o.type] for o in job.train.objectives},
        "tokens_per_request": spent,
        "kl_base": kl_by_method(drift, DRAWS, job.seed),
        "pool_slopes": pool_slopes,
        "entanglement_to_pool": beside_the_pool(found["training reward"], pool_slopes),
        "correlation": evaluated.read_json("judge.json")["correlation"],
        "hacking": evaluated.read_json("hacking.json") if evaluated.exists("hacking.json") else None,
        "comparisons": tests,
        "seeds": by_seed(runs),
        "metrics": {regime: shown(metrics) for regime, metrics in found.items()},
    }


def main() -> None:
    """Run, measure, store, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    sets = ["--set", f"run_root={parser.parse_args().root.resolve()}"]
    subprocess.run([sys.executable, "-m", "ctrlray", "sweep", str(SWEEP), *sets], check=True)
    runs = load(SWEEP, sets[1:]).runs
    figures, facts = measured(runs)
    made_at = runs[FIRST].storage.read_json("manifest.json")["commit"]
    print(store("results", figures, run_commit=made_at, **facts))
    print(results_page.write())


if __name__ == "__main__":
    main()
