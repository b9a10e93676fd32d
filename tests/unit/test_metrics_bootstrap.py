"""Draws, intervals and the sums they share."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctrlray.metrics.bootstrap import centre, draws
from ctrlray.metrics.control import code_gap
from ctrlray.metrics.entanglement import pool_slopes


def test_draws_are_the_data_and_then_resamples():
    weights = draws(5, 50, 3)
    assert weights.shape == (51, 5) and (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 5).all() and weights[1:].std() > 0
    assert (weights == draws(5, 50, 3)).all() and (weights != draws(5, 50, 4)).any()


def test_equal_values_are_centred_to_exact_zeros():
    units = np.column_stack([[0.1] * 3 + [0.7] * 6, np.arange(9.0)])
    prompt = np.repeat([0, 1], [3, 6])
    assert (centre(units, prompt, 2)[:, 0] == 0).all()  # 0.1 + 0.1 + 0.1 is not 0.3
    found = pool_slopes(units, [f"p{p}" for p in prompt], 100)
    assert [[e["value"] for e in row] for row in found] == [[0, 0], [0, 1]]


def test_prompts_are_resampled_not_rows():
    noise = np.random.default_rng(0).normal(size=20)
    once = code_gap(np.zeros(20), noise, [f"p{i}" for i in range(20)], 2000, 0)
    copied = code_gap(np.zeros(200), np.repeat(noise, 10), [f"p{i // 10}" for i in range(200)], 2000, 0)
    # ten copies of each example carry no more information when they share their prompt
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.1)
    # the normal approximation of the mean of 20
    assert once.high - once.low == pytest.approx(2 * 1.96 * noise.std() / math.sqrt(20), rel=0.1)
