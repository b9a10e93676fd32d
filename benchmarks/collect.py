"""Gathers an issue's figures into `results/<letter>.json` from what the benchmarks stored, and for some the reward heads' card.

python -m benchmarks.collect A
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.common import RESULTS, figure, store

HEADS = RESULTS.parents[1] / "ctrlray" / "assets" / "heads" / "smollm2-hh.json"
PARTS = {
    "A": ("quickstart", "generation", "ranks"),
    "C": ("training", "training_gpu", "toys", "reward_model"),
    "D": ("ppo_dial", "ppo", "toys_ppo"),
    "E": ("results", "demo", "ablation"),
    "F": ("serve",),
    "G": ("chaos", "scale", "generation", "scoring", "training", "ppo", "serve", "pipeline"),
}
MAX_BETWEEN, MAX_LENGTH = 0.5, 0.3
AIMS = {"A": {"helpfulness": 0.70, "harmlessness": 0.70}, "C": {"helpfulness": 0.70, "harmlessness": 0.66}}


def head_figures(measured: dict[str, Any], aims: dict[str, float]) -> list[dict[str, Any]]:
    """Accuracy beside length alone, and the correlations on self-sampled answers, from the heads' card."""
    figures = []
    for name, values in measured["attributes"].items():
        accuracy, low, high = values["accuracy"]
        aim = aims[name]
        figures.append(figure(f"{name} head, held-out accuracy", f"aim {aim}", accuracy, accuracy >= aim, [low, high]))
        alone = values["length_only"]
        target = "interval's lower bound above length alone"
        figures.append(figure(f"{name} head, lower bound - length alone", target, low - alone[0], low > alone[0], alone[1:]))
        r, low, high = values["length_correlation"]
        figures.append(
            figure(f"{name} head, r with length within prompt", f"|r| <= {MAX_LENGTH}", r, abs(r) <= MAX_LENGTH, [low, high])
        )
    for pair, (r, low, high) in measured["correlations"].items():
        figures.append(figure(f"r within prompt, {pair}", f"|r| <= {MAX_BETWEEN}", r, abs(r) <= MAX_BETWEEN, [low, high]))
    return figures


def main() -> None:
    """Collect and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("letter", choices=PARTS)
    letter = parser.parse_args().letter
    figures = []
    for name in PARTS[letter]:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            stored = json.loads(path.read_text())
            figures += [f | {"commit": stored["commit"]} for f in stored["figures"]]
        else:
            figures.append(figure(name, "measured", None, False))
    if letter in AIMS:
        figures += head_figures(json.loads(HEADS.read_text())["measured"], AIMS[letter])
    print(store(letter, figures))


if __name__ == "__main__":
    main()
