"""Errors, correlations and order: numbers worked by hand, and the same against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ctrlray.errors import DataError
from ctrlray.metrics import control
from ctrlray.metrics.bootstrap import Interval, draws
from ctrlray.metrics.control import (
    bias,
    code_gap,
    kendall_level_means,
    level_means,
    mae,
    monotone_prompts,
    pairwise_order,
    spearman_level_means,
    spearman_rows,
)
from ctrlray.metrics.entanglement import slopes
from tests.grids import CELLS, arrays, everyone


def test_mae_and_bias_by_hand():
    requested, units = arrays([1, 2, 3, 1], [1.5, 1.0, 3.0, 3.0])
    prompt = np.array([0, 0, 0, 1])
    # errors +0.5 -1.0 0.0 | +2.0: MAE = 3.5 / 4, bias = 1.5 / 4
    assert mae(requested, units, prompt, everyone(2)).tolist() == [0.875]
    assert bias(requested, units, prompt, everyone(2)).tolist() == [0.375]
    # a draw that holds the second prompt twice and the first once: MAE (1.5 + 4) / 5; one without the first: 2
    weights = np.array([[1.0, 2.0], [0.0, 2.0]])
    assert mae(requested, units, prompt, weights).tolist() == [1.1, 2.0]


def test_spearman_over_level_means_by_hand():
    requested, units = arrays([1, 2, 3, 1, 2, 3], [1.0, 3.0, 2.0, 2.0, 3.0, 2.5])
    prompt = np.array([0, 0, 0, 1, 1, 1])
    levels, means = level_means(requested, units, prompt, everyone(2))
    assert levels == [1, 2, 3] and means.tolist() == [[1.5, 3.0, 2.25]]
    # ranks 1 3 2 against 1 2 3: 1 - 6 (0 + 1 + 1) / (3 * 8) = 0.5
    assert spearman_level_means(requested, units, prompt, everyone(2)) == pytest.approx([0.5])


def test_spearman_over_level_means_without_a_level():
    requested, units = arrays([1, 2, 3, 3], [1.0, 2.0, 0.0, 5.0])
    prompt = np.array([0, 0, 0, 1])
    weights = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    # all: means 1, 2, 2.5 -> 1; only prompt 1: one level -> 0; only prompt 0: means 1, 2, 0 -> ranks 2 3 1 -> -0.5
    assert spearman_level_means(requested, units, prompt, weights) == pytest.approx([1.0, 0.0, -0.5])
    half = np.array([0, 0, 1, 1])  # a draw of prompt 0 alone holds levels 1 and 2 only, which rise
    assert spearman_level_means(requested, units, half, np.array([[1.0, 0.0]])) == pytest.approx([1.0])


def test_kendall_over_level_means_by_hand():
    requested, units = arrays([1, 2, 3, 1, 2, 3], [1.0, 3.0, 2.0, 2.0, 3.0, 2.5])
    prompt = np.array([0, 0, 0, 1, 1, 1])
    # means 1.5 3.0 2.25: two of three pairs rise, one falls: 1/3
    assert kendall_level_means(requested, units, prompt, everyone(2)) == pytest.approx([1 / 3])
    # means 1 1 2: of three pairs two rise and one is equal: 2 / sqrt(3 * 2)
    tied = arrays([1, 2, 3], [1.0, 1.0, 2.0])
    assert kendall_level_means(*tied, np.zeros(3, int), everyone(1)) == pytest.approx([2 / math.sqrt(6)])
    flat = arrays([1, 2, 3], [2.0, 2.0 + 1e-13, 2.0 + 2e-13])
    assert kendall_level_means(*flat, np.zeros(3, int), everyone(1)) == [0.0]
    # a draw without the prompt that holds level 3 has one pair, which rises
    some = arrays([1, 2, 3], [1.0, 2.0, 0.0])
    assert kendall_level_means(*some, np.array([0, 0, 1]), np.array([[1.0, 0.0]])) == pytest.approx([1.0])


def test_monotone_prompts_by_hand():
    requested = np.array([1, 1, 2, 2, 3, 1, 2, 3, 1, 2, 2], float)
    units = np.array([1.0, 3.0, 2.5, 2.5, 3.0, 1.0, 1.0, 2.0, 2.0, 1.0, 4.0])
    prompt = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    # prompt 0: means 2 2.5 3 rise; 1: 1 1 2 stays level once; 2: falls; 3: one level only, left out
    assert monotone_prompts(requested, units, prompt, everyone(4)) == pytest.approx([1 / 3])
    assert monotone_prompts(requested, units, prompt, np.array([[1.0, 0, 0, 5.0]])) == pytest.approx([1.0])


def test_random_scores_are_monotone_as_often_as_chance_says():
    requested, prompt = np.tile([1.0, 2.0, 3.0], 4000), np.repeat(np.arange(4000), 3)
    units = np.random.default_rng(0).normal(size=12000)
    # 1 / 3! with a standard error of sqrt(1/6 * 5/6 / 4000) = 0.006
    assert monotone_prompts(requested, units, prompt, everyone(4000)) == pytest.approx([1 / 6], abs=0.02)


def test_spearman_rows_by_hand():
    requested, units = arrays([1, 2, 3], [5.0, 5.0, 7.0])
    # ranks 1 2 3 and 1.5 1.5 3: deviations (-1 0 1), (-.5 -.5 1): 1.5 / sqrt(2 * 1.5) = 0.8660
    value = spearman_rows(requested, units, np.zeros(3, int), everyone(1))
    assert value == pytest.approx([math.sqrt(3) / 2])


def test_pairwise_by_hand():
    requested = np.array([[1, 1], [2, 1], [3, 1], [1, 2], [3, 2], [1, 1], [2, 2]], float)
    units = np.array([1.0, 1.0, 0.5, 0.0, 4.0, 0.0, 9.0])
    prompt = np.array([0, 0, 0, 0, 0, 1, 1])
    # first attribute, prompt 0: with the other at 1, (2 over 1) ties: 1/2, (3 over 1) no: 0, (3 over 2) no: 0;
    # with the other at 2: (3 over 1) yes: 1. Prompt 1 has no pair that differs in one attribute alone. (1/2 + 1) / 4
    assert pairwise_order(requested, units, 0, prompt, everyone(2)).tolist() == [0.375]
    # second attribute, prompt 0: (1,2) over (1,1): 0 > 1 no; (3,2) over (3,1): yes
    assert pairwise_order(requested, units, 1, prompt, everyone(2)).tolist() == [0.5]
    assert np.isnan(pairwise_order(requested[:1], units[:1], 0, prompt[:1], everyone(1))).all()


def test_pairwise_takes_all_samples():
    requested, units = np.array([[1.0], [1.0], [2.0], [2.0]]), np.array([0.0, 3.0, 1.0, 2.0])
    # 1 > 0, 1 < 3, 2 > 0, 2 < 3
    assert pairwise_order(requested, units, 0, np.zeros(4, int), everyone(1)).tolist() == [0.5]


def test_level_means_that_differ_by_rounding_are_equal():
    requested, units = arrays([1, 2, 3], [2.0, 2.0 + 1e-13, 2.0 + 2e-13])
    assert spearman_level_means(requested, units, np.zeros(3, int), everyone(1)) == [0.0]


def test_code_gap_by_hand():
    gap = code_gap([1.0, 1.0, 2.0], [1.5, 1.0, 3.0], ["a", "a", "b"], 500, 0)
    # gaps 0.5 0 | 1: mean 0.5; draws hold prompts aa (0.25), ab (0.5) or bb (1)
    assert gap == Interval(0.5, 0.25, 1.0)
    with pytest.raises(DataError, match="diverged"):
        code_gap([math.nan], [1.0], ["a"])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_weights_equal_repeated_rows(data):
    num = data.draw(st.integers(4, 25))
    prompt = np.array([0, 1, 2, *data.draw(st.lists(st.integers(0, 2), min_size=num - 3, max_size=num - 3))])
    level, small = st.integers(1, 3), st.integers(-3, 3)
    requested = np.array(data.draw(st.lists(st.tuples(level, level), min_size=num, max_size=num)), float)
    units = np.array(data.draw(st.lists(st.tuples(small, small), min_size=num, max_size=num)), float)
    weights = np.array([data.draw(st.tuples(*[st.integers(0, 3)] * 3).filter(any))], float)
    # the same draw written out: prompt p as weights[p] prompts of their own
    copies = [(p, k) for p in range(3) for k in range(int(weights[0, p]))]
    rows = [np.flatnonzero(prompt == p) for p, _ in copies]
    index, clone = np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    written_out = everyone(len(copies))
    for f in (mae, bias, spearman_level_means, spearman_rows, kendall_level_means, monotone_prompts):
        got = f(requested[:, 0], units[:, 0], prompt, weights)
        want = f(requested[index, 0], units[index, 0], clone, written_out)
        assert got == pytest.approx(want, abs=1e-9, nan_ok=True)
    levels, means = level_means(requested[:, 0], units[:, 0], prompt, weights)
    kept = np.isfinite(means[0])
    tau = stats.kendalltau(np.array(levels)[kept], np.round(means[0][kept], 10)).statistic if kept.sum() > 1 else math.nan
    found = kendall_level_means(requested[:, 0], units[:, 0], prompt, weights)[0]
    assert found == pytest.approx(0.0 if math.isnan(tau) else tau, abs=1e-9)
    got = pairwise_order(requested, units[:, 0], 0, prompt, weights)
    want = pairwise_order(requested[index], units[index, 0], 0, clone, written_out)
    assert got == pytest.approx(want, abs=1e-9, nan_ok=True)
    got = slopes(requested, units, prompt, weights)
    assert got == pytest.approx(slopes(requested[index], units[index], clone, written_out), abs=1e-6)
    x, y = requested[index, 0], units[index, 0]
    constant = len(set(x)) < 2 or len(set(y)) < 2
    expected = 0.0 if constant else stats.spearmanr(x, y).statistic
    assert spearman_rows(requested[:, 0], units[:, 0], prompt, weights)[0] == pytest.approx(expected, abs=1e-9)


def test_spearman_in_chunks_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    requested, units, prompt = rng.integers(1, 4, 40).astype(float), rng.normal(size=40), np.arange(40) % 8
    whole = spearman_rows(requested, units, prompt, draws(8, 50, 0))
    monkeypatch.setattr(control, "CHUNK_CELLS", 300)
    assert spearman_rows(requested, units, prompt, draws(8, 50, 0)) == pytest.approx(whole, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([lambda u: 3 * u + 1, lambda u: u**3, lambda u: np.exp(u / 4), lambda u: np.arctan(u)]),
)
def test_order_statistics_ignore_monotone_transformations(seed, transform):
    rng = np.random.default_rng(seed)
    requested, prompt = np.array(CELLS * 3, float), np.repeat(np.arange(3), 9)
    units, weights = rng.normal(size=27), draws(3, 5, 0)
    for f in (
        lambda u: spearman_rows(requested[:, 0], u, prompt, weights),
        lambda u: pairwise_order(requested, u, 0, prompt, weights),
    ):
        assert f(transform(units)) == pytest.approx(f(units), abs=1e-12)
        assert f(-units) == pytest.approx(_mirrored(f, units), abs=1e-12)


def _mirrored(f, units):
    values = f(units)
    return -values if f(np.zeros_like(units))[0] == 0 else 1 - values
