"""The reward model of jobs/reward-model at full size: how good it is on held-out pairs, its minutes, its worker's memory.

    CTRLRAY_DATA=/data python -m benchmarks.reward_model --out /data/ctrlray-reward

An interrupted training goes on from its last snapshot; its minutes are those of its steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import figure, store
from benchmarks.spine import Peaks

JOB = Path(__file__).parent.parent / "jobs" / "reward-model" / "job.yaml"
AIMS = {"helpfulness": 0.70, "harmlessness": 0.66}


def main() -> None:
    """Train, read the card, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out.resolve()
    began = time.perf_counter()
    with Peaks() as peaks:
        command = [sys.executable, "-m", "ctrlray", "reward", "train", str(JOB), "--set", f"out={out}"]
        subprocess.run(command, check=True)
    minutes = (time.perf_counter() - began) / 60
    (folder,) = (f.parent for f in out.glob("*/card.json"))
    card, curves = (json.loads((folder / name).read_text()) for name in ("card.json", "curves.json"))
    trained = sum(p["seconds"] for p in curves) / 60
    figures = [
        figure("reward model, minutes of training", "recorded", round(trained, 1), None),
        figure("reward model, minutes in all", "recorded", round(minutes, 1), None),
        *(figure(f"reward model, {name}: peak GiB", "recorded", round(gib, 2), None) for name, gib in peaks.gib.items()),
    ]
    for source in card["measured"].values():
        name = source["attribute"]
        accuracy, low, high = source["accuracy"]
        alone = source["length_only"]
        aim = AIMS[name]
        figures.append(figure(f"{name}, fine-tuned, held-out accuracy", f"aim {aim}", accuracy, accuracy >= aim, [low, high]))
        target = "interval's lower bound above length alone"
        name = f"{name}, fine-tuned, lower bound - length alone"
        figures.append(figure(name, target, round(low - alone[0], 4), low > alone[0], alone[1:]))
    print(store("reward_model", figures, loss=[round(p["loss"], 4) for p in curves]))


if __name__ == "__main__":
    main()
