"""Every method on the same HH prompts (jobs/results), CLM and ExMATE over training seeds: does the dial do what the paper says?

The sweep runs whole in a process of its own under `--root`, resumed when interrupted. Of methods that were trained over several
seeds, the answers to one prompt under one setting count as several samples: intervals resample prompts, which all seeds share.

    python -m benchmarks.results --root /data/ctrlray-results      # CTRLRAY_DATA holds hh/ and prompts/
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.common import figure, store
from ctrlray import schema
from ctrlray.metrics.compare import compare_grid
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.pipeline import Run
from ctrlray.stages.judging import as_judged
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


def against_reranking(judged: pa.Table, first: Run) -> list[dict[str, Any]]:
    """ExMATE minus best-of-n under the judge, and what n answers cost beside one."""
    figures = []
    for row in compare_grid(judged, first.job.control, DRAWS, first.job.seed):
        if {row["first"], row["second"]} == {METHOD, "reranking"} and row["statistic"] == "pairwise":
            sign = 1 if row["first"] == METHOD else -1
            low, high = sorted(round(sign * row[k], 4) for k in ("low", "high"))
            value = round(sign * row["value"], 4)
            name = f"{row['attribute']}: pairwise order accuracy under the judge, ExMATE - reranking"
            figures.append(figure(name, ">= 0", value, value >= 0, [low, high]))
    spent = (first.result("evaluate") or {})["facts"]["tokens_spent"]
    grid = first.out("evaluate").read_table("grid", schema.grid([a.name for a in first.job.control.attributes], judged=True))
    methods = grid["method"].to_pylist()
    prompts = len(set(grid["prompt_id"].to_pylist()))
    ratio = spent["reranking"] / prompts / (spent[METHOD] / methods.count(METHOD))
    figures.append(figure("tokens for one request, reranking / ExMATE", ">= 8", round(ratio, 2), ratio >= 8))
    return figures


def main() -> None:
    """Run, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    sets = ["--set", f"run_root={parser.parse_args().root.resolve()}"]
    subprocess.run([sys.executable, "-m", "ctrlray", "sweep", str(SWEEP), *sets], check=True)
    plan = load(SWEEP, sets[1:])
    first, runs = plan.runs[FIRST], list(plan.runs.values())
    control, names = first.job.control, [a.name for a in first.job.control.attributes]
    grid = together(runs)
    regimes = {"training reward": grid, "judge": as_judged(grid, first.job)}
    found = {regime: evaluate_grid(table, control, DRAWS, first.job.seed) for regime, table in regimes.items()}
    figures = [f for regime, metrics in found.items() for f in control_figures(metrics, regime)]
    figures += slope_figures(found["training reward"], (first.result("distill") or {})["facts"]["pool_slopes"], names)
    figures += against_reranking(regimes["judge"], first)
    facts = {s: (first.result(s) or {})["seconds"] for s in ("prompts", "generate", "score", "distill", "train", "evaluate")}
    print(store("results", figures, seeds=len(runs), seconds=facts, metrics=found))


if __name__ == "__main__":
    main()
