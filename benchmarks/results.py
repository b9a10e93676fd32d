"""Every method on the same HH prompts (jobs/results), CLM and ExMATE over training seeds: does the dial do what the paper says?

The sweep runs whole in a process of its own under `--root`, resumed when interrupted. Of methods that were trained over several
seeds, the answers to one prompt under one setting count as several samples: intervals resample prompts, which all seeds share. At
the end the section of docs/results.md is written anew (see results_page).

    python -m benchmarks.results --root /data/ctrlray-results      # CTRLRAY_DATA holds hh/ and prompts/
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import results_page
from benchmarks.common import figure, store
from ctrlray import schema
from ctrlray.control import ControlSpace
from ctrlray.metrics.compare import compare_grid
from ctrlray.metrics.drift import kl_by_method
from ctrlray.metrics.grid import evaluate_grid
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
    """The grids of all seeds in one, each seed another sample."""
    names = [a.name for a in runs[0].job.control.attributes]
    tables = []
    for seed, run in enumerate(runs):
        grid = run.out("evaluate").read_table("grid", schema.grid(names, judged=True))
        where = grid.column_names.index("sample")
        tables.append(grid.set_column(where, "sample", pa.array([seed] * len(grid), pa.int32())))
    return pa.concat_tables(tables)


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
                target = f"|slope| <= the pool's {limit}"
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


def tokens_per_request(run: Run) -> dict[str, float]:
    """Tokens that each method spends on one answer that it gives: reranking's are those of all its candidates."""
    spent = (run.result("evaluate") or {})["facts"]["tokens_spent"]
    answered = run.out("evaluate").read_table("answers", answers_schema(run.job), ["method"])["method"].to_pylist()
    per_request = {m: samples(m, run.job) if m == RERANKING else 1 for m in spent}
    return {m: round(tokens * per_request[m] / answered.count(m), 2) for m, tokens in spent.items()}


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
    wanted = ("spearman_level_means", "pairwise", "mae", "bias")
    made = {}
    for method, found in metrics.items():
        attributes = {name: {k: values[k] for k in wanted} for name, values in found["attributes"].items()}
        made[method] = {k: found[k] for k in kept} | {"attributes": attributes}
    return made


def measured(runs: dict[str, Run]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The figures with their targets, and all that the page shows beside them; the runs by variant, with `FIRST` among them."""
    first = runs[FIRST]
    job, names = first.job, [a.name for a in first.job.control.attributes]
    grid = together(list(runs.values()))
    regimes = {"training reward": grid, "judge": as_judged(grid, job)}
    found = {regime: evaluate_grid(table, job.control, DRAWS, job.seed) for regime, table in regimes.items()}
    tests = {regime: compare_grid(table, job.control, DRAWS, job.seed) for regime, table in regimes.items()}
    spent, pool_slopes = tokens_per_request(first), (first.result("distill") or {})["facts"]["pool_slopes"]
    figures = [f for regime, metrics in found.items() for f in control_figures(metrics, regime)]
    figures += [*slope_figures(found["training reward"], pool_slopes, names), *against_reranking(tests["judge"], spent)]
    drift = pa.concat_tables([run.out("evaluate").read_table(DRIFT, schema.drift()) for run in runs.values()])
    return figures, {
        "shape": shape(first, len(runs)),
        "stages": stages(runs),
        "training": {o.type: (first.result("train") or {})["facts"][o.type] for o in job.train.objectives},
        "tokens_per_request": spent,
        "kl_base": kl_by_method(drift, DRAWS, job.seed),
        "pool_slopes": pool_slopes,
        "correlation": first.out("evaluate").read_json("judge.json")["correlation"],
        "comparisons": tests,
        "metrics": {regime: shown(metrics) for regime, metrics in found.items()},
    }


def main() -> None:
    """Run, measure, store, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    sets = ["--set", f"run_root={parser.parse_args().root.resolve()}"]
    subprocess.run([sys.executable, "-m", "ctrlray", "sweep", str(SWEEP), *sets], check=True)
    figures, facts = measured(load(SWEEP, sets[1:]).runs)
    print(store("results", figures, **facts))
    print(results_page.write())


if __name__ == "__main__":
    main()
