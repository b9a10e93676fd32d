"""Gathers the figures of the main job into `results/A.json`: the quickstart's, generation's, training ranks', the reward heads'.

python benchmarks/collect.py
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS, figure, store

HEADS = RESULTS.parents[1] / "ctrlray" / "assets" / "heads" / "smollm2-hh.json"
MAX_BETWEEN, MAX_LENGTH, AIMED_ACCURACY = 0.5, 0.3, 0.70


def head_figures(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy beside length alone, and the correlations on self-sampled answers, from the heads' card."""
    figures = []
    for name, values in measured["attributes"].items():
        accuracy, low, high = values["accuracy"]
        figures.append(
            figure(f"{name} head, held-out accuracy", f"aim {AIMED_ACCURACY}", accuracy, accuracy >= AIMED_ACCURACY, [low, high])
        )
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
    figures = []
    for name in ("quickstart", "generation", "ranks"):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            stored = json.loads(path.read_text())
            figures += [f | {"commit": stored["commit"]} for f in stored["figures"]]
        else:
            figures.append(figure(name, "measured", None, False))
    figures += head_figures(json.loads(HEADS.read_text())["measured"])
    print(store("A", figures))


if __name__ == "__main__":
    main()
