"""One training rank with all cores, or one per core? Tokens per second of the quickstart's training steps on two cores.

Takes a finished quickstart run as input and trains a few steps of the same examples under each layout, in alternating order.

    python -m benchmarks.ranks --run ~/.local/share/ctrlray/runs/quickstart [--repeats 2]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import figure, middle, store
from ctrlray import config
from ctrlray.pipeline import Run

LAYOUTS = {"1 rank with all cores": 1, "2 ranks with half each": 2}
WARM_UP_STEPS = 2
SHORT = ["train.epochs=0.5", "train.eval_every=1000", "train.eval_examples=1"]


def tokens_per_second(source: Path, workers: int) -> float:
    """Rate of the steps after the first two, in a process of its own on a copy of the run's tables."""
    with tempfile.TemporaryDirectory() as scratch:
        for stage in ("prompts", "generate", "score", "distill"):
            shutil.copytree(source / stage, Path(scratch) / stage)
        sets = [f"run_root={scratch}", f"train.workers={workers}", *SHORT]
        command = [sys.executable, "-m", "ctrlray", "train", "quickstart", *[p for s in sets for p in ("--set", s)]]
        subprocess.run(command, check=True)
        run = Run(config.load_job("quickstart", sets))
        curve = run.out("train").sub(run.job.train.objectives[-1].type).read_json("curves.json")[WARM_UP_STEPS:]
        return float(sum(p["tokens"] for p in curve) / sum(p["seconds"] for p in curve))


def main() -> None:
    """Measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for repeat in range(options.repeats):
        for name in list(LAYOUTS)[:: 1 if repeat % 2 == 0 else -1]:
            rates[name].append(tokens_per_second(options.run.resolve(), LAYOUTS[name]))
    figures = []
    for name, measured in rates.items():
        value, spread = middle(measured)
        figures.append(figure(f"training tokens per second, {name}", "recorded", value, None, spread))
    best = max(rates, key=lambda n: middle(rates[n])[0])
    fastest = config.load_job("quickstart").train.workers == LAYOUTS[best]
    figures.append(figure("the quickstart uses the faster layout", "yes", float(fastest), fastest))
    print(store("ranks", figures, repeats=options.repeats))


if __name__ == "__main__":
    main()
