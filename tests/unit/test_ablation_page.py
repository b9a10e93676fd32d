"""The section of docs/results.md about ablations, out of made-up comparisons."""

from __future__ import annotations

import json

import pytest

from benchmarks import ablation as page


def spread(value, width=0.05, **more):
    return {"value": value, "low": value - width, "high": value + width, **more}


def variant(name, changes=(), **ends):
    """A variant whose dials' ends are told apart so well, each with its difference to the base and the p of that."""
    attributes = {
        a: {
            "levels": 3, "ends": spread(value) | ({"difference": spread(value - 0.75, p=p, p_holm=p)} if p else {}),
            "pairwise": spread(value - 0.1) | {"difference": None}, "slope": spread(0.5),
        }
        for a, (value, p) in ends.items()
    }  # fmt: skip
    measured = {"examples": 240, "seconds": 300.0, "code_gap": spread(0.125), "mean_tokens": 31.5, "attributes": attributes}
    return {"variant": name, "changes": list(changes), "state": "finished", "error": "", **measured}


def stored(*variants):
    base = variant("base", safety=(0.75, None), brevity=(0.75, None))
    failed = {"variant": "odd", "changes": ["x: 1 -> 2"], "state": "failed", "error": "no", "attributes": {}}
    return {
        "run_commit": "abc1234", "machine": {"cpu": "some CPU", "cores": 2, "memory": "12 GiB"},
        "shape": {"train": 80, "eval": 32, "samples": 6, "examples": 240},
        "comparison": {"base": "base", "variants": [base, *variants, failed]},
    }  # fmt: skip


WORSE = variant("weight-0", ["train.objectives.0.weight: 1.0 -> 0"], safety=(0.6, 0.001), brevity=(0.7, 0.4))
BETTER = variant("weight-5", ["train.objectives.0.weight: 1.0 -> 5"], safety=(0.875, 0.01), brevity=(0.8, 0.05))


def test_what_is_shown_by_the_tests_is_bold_and_said():
    said = page.section(stored(WORSE, BETTER))
    safety = said[said.index("| safety |") :]
    assert "| weight-0 | 0.60 [0.55, 0.65] | **−0.150 [−0.200, −0.100]** | 0.50 [0.45, 0.55] | | 0.50 [0.45, 0.55] |" in safety
    assert "| weight-0 | 0.70 [0.65, 0.75] | −0.050 [−0.100, 0.000] |" in safety  # brevity's, p = 0.4
    assert said.rstrip().endswith("Better than the base: weight-5 in safety. Worse than the base: weight-0 in safety.")
    assert "| odd | x: 1 -> 2 | **failed** |" in said
    assert "| base | nothing | 240 | 0.125 [0.075, 0.175] | 31.5 |" in said


def test_no_difference_is_said_too():
    assert "No variant's ends are told apart better or worse than the base's." in page.section(stored())


def test_before_it_is_measured_it_says_what_to_run():
    assert "Not measured yet." in page.section(None) and "python -m benchmarks.ablation --root" in page.section(None)


def test_figures_are_of_each_attribute_without_a_target():
    made = page.figures(stored(WORSE)["comparison"])
    assert [(f["name"], f["measured"], f["met"]) for f in made[1:3]] == [
        ("base: brevity, order accuracy of lowest against highest", 0.75, None),
        ("weight-0: safety, order accuracy of lowest against highest minus base's", pytest.approx(-0.15), None),
    ]
    assert {f["target"] for f in made} == {"no target"}


def test_the_page_is_up_to_date():
    found = json.loads(page.STORED.read_text(encoding="utf-8")) if page.STORED.is_file() else None
    written = page.PAGE.read_text(encoding="utf-8")
    assert written == page.placed(written, page.section(found), page.MARKS), "write it anew: python -m benchmarks.ablation"
