"""What to know before believing the numbers of an evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ctrlray import config
from ctrlray.metrics.grid import END_WIDTH
from ctrlray.metrics.rows import BASELINES

MAX_AT_ENDS = 0.8
MAX_TRUNCATED = 0.3
MAX_IMBALANCE = 1.5
MIN_CHANGED = 0.1


def alarms(
    metrics: Mapping[str, Any],
    cells_before: Mapping[str, int],
    cells_after: Mapping[str, int],
    strategy: str,
    control: config.Control,
) -> list[dict[str, str]]:
    """What to know before believing the numbers: name, severity (error, warning, info) and detail of each."""
    found = _cell_alarms(cells_before, cells_after, strategy, control)
    for method, result in metrics.items():
        found += _method_alarms(method, result)
    return found


def _method_alarms(method: str, result: Mapping[str, Any]) -> list[dict[str, str]]:
    found = []
    changed = result["distinct_outputs"]
    if method != BASELINES[0] and changed < MIN_CHANGED:
        detail = f"{method}: in {_percent(1 - changed)} of the prompts every setting gives the same answer."
        found.append(_alarm("settings do not change the output", "error", detail))
    for name, measured in result["attributes"].items():
        share = measured["at_extremes"]
        if share > MAX_AT_ENDS:
            detail = f"{method}: {_percent(share)} of the {name} scores lie within {END_WIDTH} of the scale's ends."
            found.append(_alarm("answers collapse to the extremes", "warning", detail))
    if 1 - result["finished"] > MAX_TRUNCATED:
        detail = f"{method}: {_percent(1 - result['finished'])} of the answers were cut off at max_tokens."
        found.append(_alarm("most answers truncated", "warning", detail))
    return found


def _cell_alarms(
    before: Mapping[str, int], after: Mapping[str, int], strategy: str, control: config.Control
) -> list[dict[str, str]]:
    grid = [",".join(map(str, c)) for c in itertools.product(*(range(1, a.levels + 1) for a in control.attributes))]
    names = ", ".join(a.name for a in control.attributes)
    unreached = [c for c in grid if not before.get(c)]
    emptied = [c for c in grid if before.get(c) and not after.get(c)]
    found = []
    if unreached:
        found.append(_alarm("empty cell", "warning", f"No answer has these levels of {names}: {_listed(unreached)}."))
    if emptied:
        detail = f"Answers exist, but strategy {strategy} keeps none at these levels of {names}: {_listed(emptied)}."
        found.append(_alarm("empty cell", "info" if strategy in ("extremes", "moec") else "warning", detail))
    counts = [n for n in after.values() if n]
    expected_empty = unreached if strategy == "moec" else unreached + emptied
    if strategy in ("balance", "moec") and counts:
        ratio = max(counts) / min(counts)
        if ratio > MAX_IMBALANCE or expected_empty:
            detail = f"The fullest cell has {max(counts)} examples, the smallest {min(counts)} ({ratio:.1f} times fewer)"
            detail += f"; {len(expected_empty)} of {len(grid)} cells are empty." if expected_empty else "."
            found.append(_alarm("cells unbalanced after balance", "warning", detail))
    return found


def _alarm(name: str, severity: str, detail: str) -> dict[str, str]:
    return {"name": name, "severity": severity, "detail": detail}


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _listed(cells: Sequence[str], most: int = 9) -> str:
    more = f" and {len(cells) - most} more" if len(cells) > most else ""
    return "; ".join(cells[:most]) + more
