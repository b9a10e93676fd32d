"""The quickstart over seeds: does the dial work, and does it fit in 20 minutes?

Each seed is a whole run of its own under `--root` (split, sampling, distillation and training order all change), resumed when
interrupted. The intervals over seeds resample prompts, those of each seed being units of their own (percentile bootstrap).

    python benchmarks/quickstart.py --root /data/ctrlray-seeds [--seeds 3] [--set train.epochs=2]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import figure, store
from ctrlray import config, schema
from ctrlray.metrics.control import code_gap
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.pipeline import STAGES, Run
from ctrlray.reporting import code_gaps

SET_UP_MINUTES = 20.0


def run_seed(root: Path, seed: int, overrides: list[str]) -> Run:
    """One whole quickstart in a process of its own, as a user would run it."""
    sets = [f"seed={seed}", f"run_root={root / f'seed{seed}'}", *overrides]
    command = [sys.executable, "-m", "ctrlray", "pipeline", "quickstart"]
    subprocess.run([*command, *[part for s in sets for part in ("--set", s)]], check=True)
    return Run(config.load_job("quickstart", sets))


def pooled(runs: list[Run], method: str) -> dict[str, Any]:
    """Metrics of all seeds' grids together: a prompt of one seed is a unit of its own."""
    import pyarrow as pa

    names = [a.name for a in runs[0].job.control.attributes]
    tables = []
    for run in runs:
        grid = run.out("evaluate").read_table("grid", schema.grid(names))
        ids = pa.array([f"{run.job.seed}:{p}" for p in grid["prompt_id"].to_pylist()])
        tables.append(grid.set_column(grid.schema.get_field_index("prompt_id"), "prompt_id", ids))
    together = evaluate_grid(pa.concat_tables(tables), runs[0].job.control, 2000, 0)
    return dict(together[method]["attributes"])


def gap_over_seeds(runs: list[Run], method: str) -> tuple[float, list[float]]:
    """Mean code gap over all seeds' held-out examples with its 95% interval; a prompt of one seed is a unit of its own."""
    tables = [run.out("train").sub(method).read_table("code_gaps", schema.code_gaps()) for run in runs]
    right, wrong = (np.concatenate([t[c].to_numpy() for t in tables]) for c in ("nll_right", "nll_wrong"))
    prompts = [f"{run.job.seed}:{p}" for run, t in zip(runs, tables, strict=True) for p in t["prompt_id"].to_pylist()]
    gap = code_gap(right, wrong, prompts, 2000)
    return round(gap.value, 4), [round(gap.low, 4), round(gap.high, 4)]


def main() -> None:
    """Run, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    runs = [run_seed(options.root.resolve(), seed, options.overrides) for seed in range(options.seeds)]
    method = runs[0].job.train.objectives[-1].type
    minutes = [sum((r.result(s) or {})["seconds"] for s in STAGES) / 60 for r in runs]
    gap, spread = gap_over_seeds(runs, method)
    figures = [
        figure("pipeline minutes, slowest seed; set-up adds 1", f"<= {SET_UP_MINUTES}", round(max(minutes), 1),
               max(minutes) + 1 <= SET_UP_MINUTES, [round(min(minutes), 1), round(max(minutes), 1)]),
        figure("held-out NLL(wrong) - NLL(right), nats per token", "> 0, interval excluding 0", gap, spread[0] > 0, spread),
    ]  # fmt: skip
    for run in runs:
        g = code_gaps(run)[method]
        bounds = [round(g["low"], 4), round(g["high"], 4)]
        name = f"the same, seed {run.job.seed} ({g['num_examples']} examples)"
        figures.append(figure(name, "> 0, interval excluding 0", round(g["value"], 4), g["low"] > 0, bounds))
    attributes = pooled(runs, method)
    for name, values in attributes.items():
        p = values["pairwise"]
        bounds = [round(p["low"], 4), round(p["high"], 4)]
        target = "> 0.5, interval excluding it, on at least one attribute"
        figures.append(figure(f"pairwise order accuracy, {name}", target, round(p["value"], 4), p["low"] > 0.5, bounds))
    print(store("quickstart", figures, seeds=options.seeds, method=method, metrics=attributes))


if __name__ == "__main__":
    main()
