"""Paired tests between methods: p-values against every permutation and against chance, and Holm's correction by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrlray.metrics.bootstrap import Sums
from ctrlray.metrics.compare import compare_grid, holm, permutation_p
from tests.grids import CELLS, CONTROL, dial, grid


def sums(top, bottom=None):
    return Sums(np.asarray(top, float), np.ones(len(top)) if bottom is None else np.asarray(bottom, float))


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.5: x4 = 0.04, x3 = 0.06, x2 = 0.06, x1 = 0.5
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    # 0.03 x 2 = 0.06, and the next may not be less
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_only_raises_and_keeps_the_order(p_values):
    found = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, found, strict=True))
    ordered = [q for _, q in sorted(zip(p_values, found, strict=True))]
    assert ordered == sorted(ordered)


def test_permutation_p_against_every_permutation():
    first, second = sums([3.0, 1.0, 2.0, 4.0, 2.5], [2, 1, 1, 3, 1]), sums([1.0, 1.5, 0.5, 2.0, 1.0], [1, 1, 2, 3, 2])
    gaps = []
    shares = [Sums(s.top_P / n, s.bottom_P / n) for s, n in ((first, 8), (second, 9))]
    for flips in itertools.product((0, 1), repeat=5):
        chosen = [
            [(b, a) if f else (a, b) for f, a, b in zip(flips, *pair, strict=True)] for pair in zip(*shares, strict=True)
        ]
        (tops, bottoms) = (np.array(c) for c in chosen)
        a, b = tops.sum(axis=0) / bottoms.sum(axis=0)
        gaps.append(abs(a - b))
    want = np.mean(np.array(gaps) >= gaps[0] - 1e-12)
    assert permutation_p(first, second, 0, 40_000) == pytest.approx(want, abs=0.01)
    assert permutation_p(first, second, 0) == permutation_p(second, first, 0)


def test_answers_that_are_counted_several_times_change_no_p_value():
    """Prompts differ far more than the methods do, which pairing takes out, also where one method answers three times."""
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 5, 40)
    first, second = sums(hard + rng.normal(1, 1, 40)), sums(hard + rng.normal(0, 1, 40))
    often = Sums(3 * first.top_P, 3 * first.bottom_P)
    p = permutation_p(first, second, 0)
    assert p < 0.1 and permutation_p(often, second, 0) == pytest.approx(p) == permutation_p(second, often, 0)


def test_equal_methods_never_differ_and_the_smallest_p_is_never_zero():
    same = sums([1.0, 2.0, 3.0])
    assert permutation_p(same, same, 0) == 1.0
    assert permutation_p(sums([0.0], [0.0]), same.of(np.array([0])), 0) == 1.0  # nothing counted: undefined
    far = permutation_p(sums(np.full(60, 9.0)), sums(np.zeros(60)), 0, 500)
    assert far == pytest.approx(1 / 501)


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(0)
    found = [permutation_p(sums(rng.normal(size=20)), sums(rng.normal(size=20)), i, 200) for i in range(300)]
    # 5% of 300 is 15, with a standard deviation of 3.8
    assert 5 <= sum(p <= 0.05 for p in found) <= 27
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_methods_of_a_grid():
    good = dial("clm", lambda c, p, r: c + p + 0.2 * r, num_prompts=20)
    weak = dial("exmate", lambda c, p, r: 0.1 * c + p + r, num_prompts=20, seed=1)
    found = compare_grid(grid(good + weak + dial("start", lambda c, p, r: p, num_prompts=20)), CONTROL, 200, 0)
    assert [(f["first"], f["second"]) for f in found[::4]] == [("start", "clm"), ("start", "exmate"), ("clm", "exmate")]
    assert [(f["attribute"], f["statistic"]) for f in found[:4]] == list(
        itertools.product(("kind", "brief"), ("pairwise", "mae"))
    )
    order = {(f["first"], f["second"], f["attribute"]): f for f in found if f["statistic"] == "pairwise"}
    clear, mirrored = order["clm", "exmate", "kind"], order["start", "clm", "kind"]
    assert clear["low"] < clear["value"] < clear["high"] and clear["low"] > 0 > mirrored["high"]
    assert clear["p"] < 0.001 and clear["num_prompts"] == 20
    # six tests of this statistic: the smallest p, of which there are some equal ones, is at most six times as large
    assert clear["p"] < clear["p_holm"] <= 6 * clear["p"] + 1e-12
    assert order["start", "exmate", "kind"]["p_holm"] >= order["start", "exmate", "kind"]["p"]


def test_models_of_a_method_are_compared_by_prompt():
    """Three models of one method that answer alike are no more evidence than one of them."""
    rows = dial("clm", lambda c, p, r: c + p + 2 * r, num_prompts=20)
    other = dial("exmate", lambda c, p, r: 0.5 * c + p + 2 * r, num_prompts=20, seed=1)
    one = compare_grid(grid(rows + other), CONTROL, 300, 0)
    thrice = grid(rows * 3 + other).append_column("model", pa.array([k for k in range(3) for _ in rows] + [0] * len(other)))
    for single, pooled in zip(one, compare_grid(thrice, CONTROL, 300, 0), strict=True):
        assert pooled["num_prompts"] == 20
        for key in ("value", "low", "high", "p"):
            assert pooled[key] == pytest.approx(single[key]), key


def test_only_shared_prompts_are_compared():
    rows = [(*r[:3], (float(r[2][0]), 1.0), *r[4:]) for r in dial("clm", lambda c, p, r: c, num_prompts=4)]
    fewer = [("start", *r[1:3], (2.0, 2.0), *r[4:]) for r in rows if r[1] in ("p01", "p02")]
    foreign = [("ppo", "elsewhere", cell, (1.0, 1.0), 5, "x") for cell in CELLS]
    found = compare_grid(grid(rows + fewer + foreign), CONTROL, 100, 0)
    assert {(f["first"], f["second"], f["num_prompts"]) for f in found} == {("start", "clm", 2)}
    by = {(f["attribute"], f["statistic"]): f["value"] for f in found}
    # start has 1/2, the dial has kind in order always; errors in kind: (1 + 0 + 1) / 3 against 0
    assert by["kind", "pairwise"] == -0.5 and by["brief", "pairwise"] == 0.0
    assert by["kind", "mae"] == pytest.approx(2 / 3)
