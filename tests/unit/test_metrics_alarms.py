"""What is told before the numbers."""

from __future__ import annotations

import numpy as np

from ctrlray.metrics.alarms import alarms
from tests.grids import CELLS, CONTROL, dial, evaluate

FULL = {f"{a},{b}": 4 for a, b in CELLS}


def names_of(alarms):
    return [(a["name"], a["severity"]) for a in alarms]


def test_no_alarm_for_a_healthy_run():
    metrics = evaluate(dial("clm", lambda c, p, r: np.clip(c + 0.3 * r, 0.8, 3.2)))
    assert alarms(metrics, FULL, FULL, "balance", CONTROL) == []


def test_dead_dials_collapse_and_truncation_are_told():
    stuck = dial("clm", lambda c, p, r: [0.6, 2.0])
    stuck = [(*r[:5], "always this") for r in stuck]
    metrics = evaluate(stuck + [("start", *r[1:]) for r in stuck])
    metrics["clm"]["finished"] = 0.69
    found = alarms(metrics, FULL, FULL, "none", CONTROL)
    assert names_of(found) == [
        ("answers collapse to the extremes", "warning"),  # of the starting model, whose settings need not matter
        ("settings do not change the output", "error"),
        ("answers collapse to the extremes", "warning"),
        ("most answers truncated", "warning"),
    ]
    assert "clm: in 100%" in found[1]["detail"] and "kind" in found[2]["detail"] and "31%" in found[3]["detail"]


def test_empty_and_unbalanced_cells_are_told():
    empty = ("empty cell", "warning")
    unbalanced = ("cells unbalanced after balance", "warning")
    assert names_of(alarms({}, FULL | {"1,1": 0}, FULL | {"1,1": 0}, "none", CONTROL)) == [empty]
    assert names_of(alarms({}, FULL | {"1,1": 0}, FULL | {"1,1": 0}, "balance", CONTROL)) == [empty, unbalanced]
    assert names_of(alarms({}, FULL, FULL | {"1,1": 6}, "balance", CONTROL)) == []  # 6 / 4 is the limit
    assert names_of(alarms({}, FULL, FULL | {"1,1": 7}, "balance", CONTROL)) == [unbalanced]
    assert names_of(alarms({}, FULL, FULL | {"1,1": 7}, "none", CONTROL)) == []
    # moec empties the middle on purpose
    assert names_of(alarms({}, FULL, FULL | {"2,2": 0}, "moec", CONTROL)) == [("empty cell", "info")]
