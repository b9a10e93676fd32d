"""Coefficients of agreement against published examples, numbers worked by hand, and their definitions written out plainly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlray.metrics import agreement as agree
from ctrlray.metrics.bootstrap import draws

NONE = agree.MISSING
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units, values 1 to 5
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def one(*values):
    """A matrix as that of a single draw."""
    return np.array([values], np.float64)


def test_alpha_as_published():
    ratings = np.array(OBSERVERS) - 1  # 0 becomes -1, missing
    counts = agree.coincidences(ratings, np.zeros(12, np.int64), 1, 5)
    assert counts.sum() == pytest.approx(40)  # the last unit has one value: no pair
    assert agree.krippendorff_alpha(counts, "nominal")[0] == pytest.approx(0.743, abs=5e-4)
    assert agree.krippendorff_alpha(counts, "ordinal")[0] == pytest.approx(0.815, abs=5e-4)


def test_kappa_as_published():
    # Cohen 1960, table 1: p_o = 0.70, p_c = (0.6 x 0.5 + 0.3 x 0.3 + 0.1 x 0.2) = 0.41, kappa = 0.29 / 0.59
    counts = one([88, 14, 18], [10, 40, 10], [2, 6, 12])
    assert agree.cohen_kappa(counts)[0] == pytest.approx(0.29 / 0.59)


def test_nominal_alpha_by_hand():
    # items (A, A), (A, B), (B, B): o_AA = 2, o_BB = 2, o_AB = o_BA = 1; n = 6, n_A = n_B = 3
    # alpha = 1 - (6 - 1) x (1 + 1) / (3 x 3 + 3 x 3) = 1 - 10 / 18
    counts = agree.coincidences(np.array([[2, 2, 0], [2, 0, 0]]), np.zeros(3, np.int64), 1)
    np.testing.assert_array_equal(counts[0], [[2, 0, 1], [0, 0, 0], [1, 0, 2]])
    assert agree.krippendorff_alpha(counts, "nominal")[0] == pytest.approx(1 - 10 / 18)


def test_confusions_leave_out_what_one_side_lacks():
    counts = agree.confusions(np.array([2, 2, 1, NONE, 0]), np.array([2, 0, 2, 2, NONE]), np.array([0, 1, 1, 0, 0]), 3)
    assert counts.sum() == 3 and counts[0, 2, 2] == counts[1, 2, 0] == counts[1, 1, 2] == 1


def test_accuracies_by_hand():
    # rows: what raters chose (B, tie, A); columns: the reference. 6 right, 2 wrong, 4 ties of raters, 3 of the reference
    counts = one([2, 1, 1], [3, 1, 1], [1, 1, 4])
    assert agree.accuracy(agree.decided(counts))[0] == 6 / 8
    assert agree.order_accuracy(counts)[0] == (6 + 4 / 2) / 12
    # kappa of the decided ones: margins 3, 5 and 3, 5 of 8: p_e = (9 + 25) / 64
    assert agree.cohen_kappa(agree.decided(counts))[0] == pytest.approx((6 / 8 - 34 / 64) / (1 - 34 / 64))


def test_alpha_with_a_reference_by_hand():
    counts = one([2, 0, 1], [1, 0, 1], [1, 0, 4])
    # o = C + C' = [[4, 1, 2], [1, 0, 1], [2, 1, 8]], margins 7, 2, 11 of 20
    # squared differences: B-tie (3.5 + 1)^2 = 20.25, tie-A (1 + 5.5)^2 = 42.25, B-A (3.5 + 2 + 5.5)^2 = 121
    # alpha = 1 - 19 x 2 (1 x 20.25 + 1 x 42.25 + 2 x 121) / (2 (14 x 20.25 + 22 x 42.25 + 77 x 121))
    alpha = agree.krippendorff_alpha(agree.both_ways(counts), "ordinal")[0]
    assert alpha == pytest.approx(1 - 19 * 609 / 21060)


def test_undefined_is_nan_and_not_a_number_that_looks_fine():
    nothing, same = np.zeros((1, 3, 3)), one([0, 0, 0], [0, 0, 0], [0, 0, 8])
    for counts in (nothing, same):
        assert math.isnan(agree.krippendorff_alpha(counts, "ordinal")[0])
        assert math.isnan(agree.cohen_kappa(counts)[0])
    assert math.isnan(agree.accuracy(nothing)[0]) and agree.accuracy(same)[0] == 1.0
    assert math.isnan(agree.order_accuracy(one([0, 5, 0], [0, 5, 0], [0, 5, 0]))[0])


def test_ordinal_forgives_a_neighbour_more_than_an_opposite():
    near, far = np.array([[0, 1, 2, 2, 0, 1], [0, 1, 2, 1, 0, 1]]), np.array([[0, 1, 2, 2, 0, 1], [0, 1, 2, 0, 0, 1]])
    unit = np.zeros(6, np.int64)
    alphas = [agree.krippendorff_alpha(agree.coincidences(r, unit, 1), "ordinal")[0] for r in (near, far)]
    assert alphas[0] > alphas[1]


def plain_alpha(ratings, ordinal):
    """Alpha from its definition, pair by pair."""
    units = [[r for r in column if r != NONE] for column in zip(*ratings, strict=True)]
    units = [u for u in units if len(u) > 1]
    values = [r for u in units for r in u]
    if not values:
        return math.nan

    def difference(x, y):
        low, high = min(x, y), max(x, y)
        between = sum(values.count(v) for v in range(low, high + 1)) - (values.count(x) + values.count(y)) / 2
        return (between**2 if ordinal else 1.0) if x != y else 0.0

    observed = sum(difference(x, y) / (len(u) - 1) for u in units for x, y in itertools.permutations(u, 2)) / len(values)
    expected = sum(difference(x, y) for x, y in itertools.permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected if expected else math.nan


def plain_kappa(first, second):
    """Kappa from its definition."""
    both = len(first)
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / both
    expected = sum(first.count(k) * second.count(k) for k in range(3)) / both**2
    return (observed - expected) / (1 - expected) if expected != 1 else math.nan


RATINGS = st.integers(1, 4).flatmap(
    lambda units: st.lists(st.lists(st.integers(-1, 2), min_size=units, max_size=units), min_size=2, max_size=4)
)


@settings(max_examples=150, deadline=None)
@given(RATINGS, st.sampled_from(["nominal", "ordinal"]))
def test_alpha_is_its_definition(ratings, metric):
    array = np.array(ratings)
    counts = agree.coincidences(array, np.zeros(array.shape[1], np.int64), 1)
    found = agree.krippendorff_alpha(counts, metric)[0]
    assert found == pytest.approx(plain_alpha(ratings, metric == "ordinal"), abs=1e-9, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_kappa_and_alpha_of_two_are_their_definitions(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    counts = agree.confusions(np.array(first), np.array(second), np.zeros(len(first), np.int64), 1)
    assert agree.cohen_kappa(counts)[0] == pytest.approx(plain_kappa(first, second), abs=1e-9, nan_ok=True)
    alpha = agree.krippendorff_alpha(agree.both_ways(counts), "ordinal")[0]
    assert alpha == pytest.approx(plain_alpha([first, second], True), abs=1e-9, nan_ok=True)


def test_a_draw_is_the_coefficient_of_the_rows_that_it_holds():
    """Resampling prompts by weights equals computing on their repeated rows."""
    rng = np.random.default_rng(0)
    ratings, prompt = rng.integers(-1, 3, (3, 20)), np.repeat(np.arange(5), 4)
    weights = draws(5, 6, seed=1)
    alphas = agree.krippendorff_alpha(agree.drawn(weights, agree.coincidences(ratings, prompt, 5)), "ordinal")
    for weight, alpha in zip(weights, alphas, strict=True):
        repeated = np.concatenate([np.tile(ratings[:, prompt == p], int(weight[p])) for p in range(5)], axis=1)
        assert alpha == pytest.approx(plain_alpha(repeated.tolist(), True), abs=1e-9)
