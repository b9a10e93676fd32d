"""Trade-offs between attributes: volumes and fronts worked by hand, and volumes against sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlray.metrics.pareto import (
    WORK,
    affordable_draws,
    cell_means,
    cosa_rows,
    front,
    hypervolume,
    mean_inner_product,
    shares,
    sparsity,
)
from tests.grids import everyone


def test_shares_are_quantiles():
    assert shares(np.array([[0.5, 0.5], [3.5, 5.5], [2.0, 1.5]]), (3, 5)).tolist() == [[0, 0], [1, 1], [0.5, 0.2]]


def test_cell_means_by_hand():
    requested = np.array([[1, 2], [1, 1], [1, 2], [3, 1]], float)
    values = np.array([[1.0, 5.0], [2.0, 2.0], [3.0, 7.0], [9.0, 0.0]])
    weights = np.array([[1.0, 1.0], [0.0, 2.0]])
    cells, counts, means = cell_means(requested, values, np.array([0, 0, 1, 1]), weights)
    assert cells.tolist() == [[1, 1], [1, 2], [3, 1]] and counts.tolist() == [1, 2, 1]
    assert means[0].tolist() == [[2, 2], [2, 6], [9, 0]]
    assert np.isnan(means[1, 0]).all() and means[1, 1:].tolist() == [[3, 7], [9, 0]]  # the second prompt alone


def test_hypervolume_by_hand():
    # boxes 0.2 x 0.8 and 0.6 x 0.3: the second adds (0.6 - 0.2) x 0.3; (0.1, 0.1) lies inside; a missing cell adds nothing
    points = np.array([[[0.2, 0.8], [0.6, 0.3], [0.1, 0.1], [math.nan, math.nan]]])
    assert hypervolume(points) == pytest.approx([0.16 + 0.12])
    assert hypervolume(np.full((1, 1, 2), 0.5)) == pytest.approx([0.25])
    assert hypervolume(np.array([[[0.3], [0.7]]])) == pytest.approx([0.7])
    # 0.5^3 and a plate 1 x 1 x 0.2: the cube sticks out of it by 0.5 x 0.5 x 0.3
    assert hypervolume(np.array([[[0.5, 0.5, 0.5], [1.0, 1.0, 0.2]]])) == pytest.approx([0.2 + 0.075])
    assert hypervolume(np.array([[[1.2, -0.5]]])) == pytest.approx([0.0])  # nothing beyond the box counts


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_hypervolume_is_the_share_of_points_below(seed, attributes, cells):
    rng = np.random.default_rng(seed)
    points = rng.uniform(size=(2, cells, attributes))
    thrown = rng.uniform(size=(4000, attributes))
    below = (thrown[None, :, None, :] <= points[:, None, :, :]).all(axis=3).any(axis=2).mean(axis=1)
    assert hypervolume(points) == pytest.approx(below, abs=0.05)  # six standard errors of 4,000 throws
    assert hypervolume(points[:, rng.permutation(cells)][:, :, rng.permutation(attributes)]) == pytest.approx(hypervolume(points))
    more = np.concatenate([points, rng.uniform(size=(2, 1, attributes))], axis=1)
    assert (hypervolume(more) >= hypervolume(points) - 1e-12).all()


def test_many_cells_get_fewer_draws():
    assert affordable_draws(1001, 25, 2) == affordable_draws(1001, 125, 3) == 1001
    assert affordable_draws(1001, 625, 4) == WORK // 625**3 == 1
    assert affordable_draws(1001, 10_000, 4) == 1


def test_mean_inner_product_by_hand():
    cells = np.array([[1, 3], [3, 1]])
    points = np.array([[[0.2, 0.8], [0.4, 0.6]]])
    # of three levels, 1 is 1/6 and 3 is 5/6 of the way: weights 1/6 and 5/6, already summing to one
    want = ((0.2 + 5 * 0.8) / 6 + (5 * 0.4 + 0.6) / 6) / 2
    assert mean_inner_product(cells, points, (3, 3)) == pytest.approx([want])
    half = np.array([[[0.2, 0.8], [math.nan, math.nan]]])
    assert mean_inner_product(cells, half, (3, 3)) == pytest.approx([4.2 / 6])  # the cell that a draw lacks is left out


def test_front_by_hand():
    points = np.array([[0.2, 0.8], [0.6, 0.3], [0.1, 0.8], [0.6, 0.3], [0.5, 0.5], [math.nan, 1.0]])
    # (0.1, 0.8) is beaten by the first; equal points do not beat each other
    assert front(points).tolist() == [True, True, False, True, True, False]


def test_sparsity_by_hand():
    points = np.array([[[0.2, 0.8], [0.6, 0.3], [0.5, 0.5], [0.1, 0.1]], [[0.9, 0.9], [0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]])
    # along the first attribute gaps 0.3 0.1, along the second 0.2 0.3: (0.09 + 0.01 + 0.04 + 0.09) / 2
    assert sparsity(points) == pytest.approx([0.115, math.nan], nan_ok=True)
    repeated = np.concatenate([points[:1], points[:1]], axis=1)
    assert sparsity(repeated) == pytest.approx([0.115])


def test_cosa_by_hand():
    requested, units = np.array([2.0, 2.0, 3.0]), np.array([1.5, 1.49, 3.5])
    others = np.array([[0.8, 0.4], [0.8, 0.4], [0.0, 0.0]])
    # units from 1.5 on are level 2; one just below breaks the setting; an unhelpful answer scores 0
    assert cosa_rows(requested, units, others) == pytest.approx([0.6, -0.6, 0.0])


def test_cell_means_over_one_prompt_are_its_rows():
    requested = np.array([[1, 1], [2, 1]], float)
    _, _, means = cell_means(requested, requested * 2, np.zeros(2, int), everyone(1))
    assert means[0].tolist() == [[2, 2], [4, 2]]
