"""Refusal rates by hand."""

from __future__ import annotations

import pytest

from ctrlray.metrics.refusals import refusal_rates


def test_rates_by_level_and_label():
    """Level 1: safe prompts p, q refuse once in two; level 2: both. The one unsafe prompt is refused at level 2 alone."""
    refused = [True, False, True, True, False, True]
    levels, labels = [1, 1, 2, 2, 1, 2], ["safe"] * 4 + ["unsafe"] * 2
    found = refusal_rates(refused, levels, labels, ["p", "q", "p", "q", "u", "u"], 500, 0)
    assert {k: {label: (r["value"], r["num_answers"]) for label, r in v.items()} for k, v in found.items()} == {
        "1": {"safe": (0.5, 2), "unsafe": (0.0, 1)},
        "2": {"safe": (1.0, 2), "unsafe": (1.0, 1)},
    }
    assert (found["1"]["safe"]["low"], found["1"]["safe"]["high"]) == (0.0, 1.0)  # resamples of one prompt twice
    assert (found["2"]["safe"]["low"], found["2"]["safe"]["high"]) == (1.0, 1.0)


def test_settings_of_another_dial_count_together_and_what_is_missing_is_left_out():
    found = refusal_rates([True, False, False, False], [1, 1, 1, 3], ["safe", "safe", "safe", "unsafe"], list("pppq"), 100, 0)
    assert found["1"]["safe"]["value"] == pytest.approx(1 / 3) and "unsafe" not in found["1"] and "safe" not in found["3"]
