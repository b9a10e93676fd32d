"""Slopes and what length explains: numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctrlray.metrics.bootstrap import Interval
from ctrlray.metrics.control import pairwise_order
from ctrlray.metrics.entanglement import (
    correlation_within,
    entanglement_index,
    length_adjusted,
    off_diagonal,
    pool_slopes,
    relative_to_pool,
    slopes,
    steering,
)
from tests.grids import everyone


def test_slopes_by_hand():
    requested = np.array([[a, b] for a in (1, 2, 3) for b in (1, 2, 3)] * 2, float)
    prompt = np.repeat([0, 1], 9)
    # kind = 5 + 0.5 a - 0.25 b, brief = 2 b, and each prompt has its own level of both
    units = np.column_stack([5 + 0.5 * requested[:, 0] - 0.25 * requested[:, 1], 2 * requested[:, 1]])
    units += np.array([[10.0, -3.0]]) * prompt[:, None]
    # row = requested attribute, column = achieved attribute
    assert slopes(requested, units, prompt, everyone(2))[0] == pytest.approx(np.array([[0.5, 0.0], [-0.25, 2.0]]))


def test_slopes_hold_the_other_setting_fixed():
    # settings 1,1 2,1 2,2 3,2 rise together; units follow the first alone, so the second must get 0
    requested = np.array([[1, 1], [2, 1], [2, 2], [3, 2]], float)
    found = slopes(requested, requested[:, :1] * [1, 0], np.zeros(4, int), everyone(1))[0]
    assert found == pytest.approx(np.array([[1.0, 0.0], [0.0, 0.0]]))


def test_a_setting_that_never_varies_has_slope_zero():
    requested = np.array([[1, 2], [2, 2], [3, 2]], float)
    found = slopes(requested, requested.copy(), np.zeros(3, int), everyone(1))[0]
    assert found == pytest.approx(np.array([[1.0, 0.0], [0.0, 0.0]]))


def test_length_adjusted_by_hand():
    tokens = np.expm1([1.0, 2.0, 3.0, 2.0, 3.0, 4.0])  # l = 1 2 3 | 2 3 4
    prompt = np.array([0, 0, 0, 1, 1, 1])
    units = np.array([[1.0], [2.0], [6.0], [9.0], [8.0], [10.0]])
    # centred l is (-1 0 1) in both prompts; units rise by 5 and by 1: b = (5 + 1) / (2 + 2) = 1.5; mean l = 2.5
    want = units[:, 0] - 1.5 * np.array([-1.5, -0.5, 0.5, -0.5, 0.5, 1.5])
    assert length_adjusted(units, tokens, prompt)[:, 0] == pytest.approx(want)


def test_length_that_never_varies_takes_nothing_away():
    units = np.array([[1.0], [2.0], [6.0]])
    assert length_adjusted(units, np.full(3, 7.0), np.array([0, 0, 1])).tolist() == units.tolist()


def test_scores_that_follow_length_alone_are_no_dial_once_adjusted():
    prompt, requested = np.repeat(np.arange(30), 3), np.array([[1.0], [2.0], [3.0]] * 30)
    tokens = 5 + 7 * requested[:, 0] + prompt  # longer at every higher setting
    units = 0.7 * np.log1p(tokens)[:, None] + 0.1 * prompt[:, None]
    adjusted = length_adjusted(units, tokens, prompt)
    assert pairwise_order(requested, units[:, 0], 0, prompt, everyone(30)) == [1.0]
    assert pairwise_order(requested, adjusted[:, 0], 0, prompt, everyone(30)) == [0.5]  # ties, not rounding noise


def test_pool_slopes_by_hand():
    units = np.array([[1.0, 5.0], [3.0, 4.0], [11.0, 1.0], [13.0, 2.0]])
    # centred: (-1, .5) (1, -.5) (-1, -.5) (1, .5): var 4 and 1, cov -.5 -.5 +.5 +.5 = 0
    flat = pool_slopes(units, ["a", "a", "b", "b"], 100)
    assert [[e["value"] for e in row] for row in flat] == [[1, 0], [0, 1]]
    tilted = pool_slopes(units[:2], ["a", "a"], 100)
    # cov -1, variances 2 and 0.5: brief on kind -1/2, kind on brief -2
    assert [[e["value"] for e in row] for row in tilted] == [[1, -0.5], [-2, 1]]


def test_correlation_within_by_hand():
    # group means hide it: within a and within b, y falls as x rises
    found = correlation_within([1, 2, 11, 12], [2, 1, 12, 11], ["a", "a", "b", "b"], 100)
    assert found == Interval(-1.0, -1.0, -1.0)
    assert correlation_within([1, 2], [5, 5], ["a", "a"], 100) == Interval(0.0, 0.0, 0.0)


def test_entanglement_by_hand():
    matrix = np.array([[[0.5, -0.2], [0.1, 0.7]], [[0.0, 0.3], [0.3, 0.0]]])
    # beside the diagonal 0.2 and 0.1: 0.15; along it (0.5 + 0.7) / 2 = 0.6; a dial that moves nothing along has no index
    assert off_diagonal(matrix) == pytest.approx([0.15, 0.3])
    assert entanglement_index(matrix) == pytest.approx([0.25, math.nan], nan_ok=True)
    assert np.isnan(off_diagonal(matrix[:, :1, :1])).all()
    three = np.eye(3)[None] + 0.5 * (1 - np.eye(3)[None])
    assert entanglement_index(three) == pytest.approx([0.5])


def test_entanglement_relative_to_the_pool():
    def flat(value):
        return Interval(value, value, value)

    pool = [[flat(1.0), flat(-0.6)], [flat(-0.2), flat(1.0)]]
    # the pool's index is (0.6 + 0.2) / 2 = 0.4
    assert relative_to_pool(Interval(0.2, 0.1, 0.6), pool) == pytest.approx(Interval(0.5, 0.25, 1.5))
    apart = [[flat(1.0), flat(0.0)], [flat(0.0), flat(1.0)]]
    assert all(math.isnan(x) for x in relative_to_pool(Interval(0.2, 0.1, 0.6), apart))


def test_steering_by_hand():
    source = np.zeros((4, 2))
    requested = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
    units = np.array([[3.0, 0.0], [6.0, 8.0], [0.0, 0.0], [1.0, 1.0]])
    found = steering(requested, units, source)
    # one short of four: 1/4, nothing sideways | two too far along, eight across of a movement of ten | unmoved | nothing asked
    assert found.error_N == pytest.approx([1.0, math.sqrt(4 + 64), 4.0, math.sqrt(2)])
    assert found.miscalibration_N == pytest.approx([0.25, 0.5, 1.0, math.nan], nan_ok=True)
    assert found.orthogonality_N == pytest.approx([0.0, 0.8, 0.0, math.nan], nan_ok=True)


def test_steering_error_is_its_two_parts():
    rng = np.random.default_rng(0)
    requested, units, source = rng.normal(size=(3, 50, 3))
    found = steering(requested, units, source)
    along = found.miscalibration_N * np.linalg.norm(requested - source, axis=1)
    across = found.orthogonality_N * np.linalg.norm(units - source, axis=1)
    assert found.error_N**2 == pytest.approx(along**2 + across**2)  # Pythagoras
    assert ((found.orthogonality_N >= 0) & (found.orthogonality_N <= 1)).all()
