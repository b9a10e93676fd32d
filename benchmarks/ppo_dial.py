"""Reinforcement learning on the embedded model, jobs/ppo as a user runs it: does it lower the control error, and at what KL?

The job runs whole in a process of its own under `--root`, resumed when interrupted (its minutes are those of its stages). The
error is the mean absolute distance between requested and achieved levels, over both attributes; PPO's is compared with ExMATE's
on the same held-out prompts and settings, by a bootstrap over prompts.

    python -m benchmarks.ppo_dial --root /data/ctrlray-ppo
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import figure, store
from ctrlray import config, schema
from ctrlray.pipeline import STAGES, Run

JOB = Path(__file__).parent.parent / "jobs" / "ppo" / "job.yaml"
RESAMPLES = 10_000


def errors(run: Run, method: str) -> dict[str, list[float]]:
    """Mean distance over both attributes of each answer in the grid, by prompt."""
    names = [a.name for a in run.job.control.attributes]
    found: dict[str, list[float]] = {}
    for row in run.out("evaluate").read_table("grid", schema.grid(names)).to_pylist():
        if row["method"] == method:
            distance = np.mean([abs(row[f"units_{n}"] - row[f"requested_{n}"]) for n in names])
            found.setdefault(row["prompt_id"], []).append(float(distance))
    return found


def difference(before: dict[str, list[float]], after: dict[str, list[float]], seed: int = 0) -> tuple[float, list[float]]:
    """Mean of after - before over prompts, and its bootstrap 95% interval."""
    per_prompt = np.array([np.mean(after[p]) - np.mean(before[p]) for p in sorted(before)])
    drawn: npt.NDArray[Any] = np.random.default_rng(seed).integers(len(per_prompt), size=(RESAMPLES, len(per_prompt)))
    low, high = np.quantile(per_prompt[drawn].mean(1), [0.025, 0.975])
    return round(float(per_prompt.mean()), 4), [round(float(low), 4), round(float(high), 4)]


def main() -> None:
    """Run, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    sets = ["--set", f"run_root={parser.parse_args().root.resolve()}"]
    subprocess.run([sys.executable, "-m", "ctrlray", "pipeline", str(JOB), *sets], check=True)
    run = Run(config.load_job(JOB, sets[1:]))
    minutes = sum((run.result(s) or {})["seconds"] for s in STAGES) / 60
    by_method = {m: errors(run, m) for m in ("exmate", "ppo")}
    value, bounds = difference(by_method["exmate"], by_method["ppo"])
    curves = run.out("train").sub("ppo").read_json("curves.json")
    kl = float(np.mean([p["kl"] for p in curves[-10:] if "kl" in p]))
    figures = [
        figure("ppo job, minutes of its stages", "<= 60", round(minutes, 1), minutes <= 60),
        figure("control error, PPO - ExMATE, level units", "< 0, interval without 0", value, bounds[1] < 0, bounds),
        figure("KL to the start at the end, nats per response", "<= 10", round(kl, 2), kl <= 10),
    ]
    for method, found in by_method.items():
        mean = float(np.mean([error for errors_of_prompt in found.values() for error in errors_of_prompt]))
        figures.append(figure(f"control error, {method}", "recorded", round(mean, 4), None))
    seconds = {k: round(float(np.mean([p.get(k, 0.0) for p in curves])), 3) for k in curves[-1] if k.endswith("_s")}
    print(store("ppo_dial", figures, seconds_per_step=seconds, reward=[round(p["reward"], 4) for p in curves]))


if __name__ == "__main__":
    main()
