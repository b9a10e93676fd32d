"""How far one dial moves another: slopes of all scores on all settings, and what answer length explains of them.

Shapes, units and the meaning of `weights_BP` are those of `ctrlray.metrics.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctrlray.errors import DataError
from ctrlray.metrics.bootstrap import (
    DIGITS,
    Floats,
    Interval,
    Ints,
    centre,
    divide,
    draws,
    interval,
    matrix_json,
    numbers,
    products,
    ratio_or_zero,
)


def slopes(requested_NA: Floats, units_NA: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """slopes_BAA[., i, j]: levels of attribute j achieved per level of i requested, other settings held fixed.

    Multivariate least squares (X'X)^+ X'Y with settings X and units Y, both centred within each prompt. The diagonal is
    1 for a perfect dial; off the diagonal stands entanglement. A setting that never varies has slope 0.
    """
    num_prompts = weights_BP.shape[1]
    x_NA, y_NA = centre(requested_NA, prompt_N, num_prompts), centre(units_NA, prompt_N, num_prompts)
    xx, xy = products(x_NA, x_NA, prompt_N, num_prompts), products(x_NA, y_NA, prompt_N, num_prompts)
    gram_BAA = np.einsum("bp,pij->bij", weights_BP, xx)
    return np.asarray(np.linalg.pinv(gram_BAA, rcond=1e-9, hermitian=True) @ np.einsum("bp,pij->bij", weights_BP, xy))


def off_diagonal(slopes_BAA: Floats) -> Floats:
    """Mean absolute slope beside the diagonal: levels moved sideways per level requested; NaN with one attribute.

    An absolute value is never negative, so noise raises it (and its interval): compare methods on the same grid.
    """
    size = slopes_BAA.shape[1]
    if size < 2:
        return np.full(len(slopes_BAA), np.nan)
    beside = np.abs(slopes_BAA)[:, ~np.eye(size, dtype=bool)]
    return np.asarray(beside.mean(axis=1))


def entanglement_index(slopes_BAA: Floats) -> Floats:
    """Levels moved sideways per level moved along: mean |off diagonal| / mean |diagonal|; NaN where nothing moves.

    0 is a dial whose attributes move apart, 1 one whose attributes move together as far as they move at all. The data
    pool's own index (its diagonal is 1) is what copying the data would give; `relative_to_pool` divides by it.
    """
    diagonal_BA = np.abs(np.diagonal(slopes_BAA, axis1=1, axis2=2))
    return divide(off_diagonal(slopes_BAA), np.where(diagonal_BA.mean(axis=1) > 10.0**-DIGITS, diagonal_BA.mean(axis=1), 0.0))


def relative_to_pool(index: Interval, pool: Sequence[Sequence[Interval]]) -> Interval:
    """A method's entanglement index as a multiple of the data pool's; below 1 the dial keeps its attributes further apart.

    The pool's own uncertainty is left out: it rests on many more answers than the grid.
    """
    pool_index = float(entanglement_index(np.array([[[entry.value for entry in row] for row in pool]]))[0])
    if not pool_index > 10.0**-DIGITS:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(*(x / pool_index for x in index))


class Steering(NamedTuple):
    """How far each answer lies from its target in level units, split by direction."""

    error_N: Floats
    miscalibration_N: Floats
    orthogonality_N: Floats


def steering(requested_NA: Floats, units_NA: Floats, source_NA: Floats) -> Steering:
    """Steering error and its split into miscalibration and orthogonality (arXiv:2505.23816, section 2).

    With source z0, target z* and answer z, and d = z* - z0 the movement that was requested:

        error          |z - z*|
        miscalibration |(z - z*) . d| / |d|^2: too far or not far enough along the requested direction; 1 for no movement
        orthogonality  |part of z - z0 across d| / |z - z0|: the share of the movement that went sideways, in [0, 1]

    Theirs is a text to be rewritten; here z0 is what the starting model, which knows no setting, reaches on the same
    prompt. Miscalibration is NaN where nothing was requested (d = 0), orthogonality is 0 where nothing moved (as in
    the authors' code).
    """
    wanted_NA, moved_NA, missed_NA = requested_NA - source_NA, units_NA - source_NA, units_NA - requested_NA
    wanted_N, moved_N = np.linalg.norm(wanted_NA, axis=1), np.linalg.norm(moved_NA, axis=1)
    far_N = wanted_N > 10.0**-DIGITS
    safe_N = np.where(far_N, wanted_N, 1.0)
    along_N = (moved_NA * wanted_NA).sum(axis=1) / safe_N
    across_N = np.sqrt(np.maximum(moved_N**2 - along_N**2, 0.0))
    miscalibration = np.abs((missed_NA * wanted_NA).sum(axis=1)) / safe_N**2
    return Steering(
        np.linalg.norm(missed_NA, axis=1),
        np.where(far_N, miscalibration, np.nan),
        np.where(far_N, ratio_or_zero(across_N, moved_N), np.nan),
    )


def length_adjusted(units_NA: Floats, num_tokens_N: Floats, prompt_N: Ints) -> Floats:
    """Units with answer length partialled out: y - b (l - mean l), where l = log(1 + tokens).

    b is the least-squares slope of units on l within prompts, pooled over the method's rows; it is fitted once per
    attribute, not in each resample. This is the cautious reading: whatever length could explain is taken away, also
    where the setting moves length and score at once.
    """
    num_prompts = int(prompt_N.max()) + 1
    log_N1 = np.log1p(num_tokens_N)[:, None]
    x_N1, y_NA = centre(log_N1, prompt_N, num_prompts), centre(units_NA, prompt_N, num_prompts)
    variance = float((x_N1**2).sum())
    slope_A = (x_N1 * y_NA).sum(axis=0) / variance if variance > 10.0**-DIGITS else np.zeros(units_NA.shape[1])
    return np.asarray(np.round(units_NA - slope_A * (log_N1 - log_N1.mean()), DIGITS))


def pool_slopes(
    units: ArrayLike, prompt_ids: Sequence[str], num_bootstrap: int = 1000, seed: int = 0
) -> list[list[dict[str, float | None]]]:
    """The data pool's natural entanglement, JSON-ready like a method's `slopes`; `units` is [answers, A].

    Entry [i][j] is the slope of attribute j's units on attribute i's alone, both centred within prompts:
    cov(u_i, u_j) / var(u_i); 1 on the diagonal, 0 where u_i never varies within a prompt.
    """
    units_NA = np.asarray(units, np.float64)
    prompt_N, num_prompts = numbers(prompt_ids, len(units_NA), "pool_slopes")
    weights_BP = draws(num_prompts, num_bootstrap, seed)
    y_NA = centre(units_NA, prompt_N, num_prompts)
    cov_BAA = np.einsum("bp,pij->bij", weights_BP, products(y_NA, y_NA, prompt_N, num_prompts))
    var_BA = np.diagonal(cov_BAA, axis1=1, axis2=2)
    matrix_BAA = np.divide(cov_BAA, var_BA[:, :, None], out=np.zeros_like(cov_BAA), where=var_BA[:, :, None] > 0)
    return matrix_json(matrix_BAA)


def correlation_within(x: ArrayLike, y: ArrayLike, groups: Sequence[str], num_bootstrap: int = 1000, seed: int = 0) -> Interval:
    """Pearson correlation of x and y, both centred within their group; 0 where one is constant. Resamples groups."""
    pair_N2 = np.column_stack([np.asarray(x, np.float64), np.asarray(y, np.float64)])
    if not np.isfinite(pair_N2).all():
        raise DataError("correlation_within: values must be finite; leave quarantined rows out")
    group_N, num_groups = numbers(groups, len(pair_N2), "correlation_within")
    centred = centre(pair_N2, group_N, num_groups)
    weights_BP = draws(num_groups, num_bootstrap, seed)
    cov_B22 = np.einsum("bp,pij->bij", weights_BP, products(centred, centred, group_N, num_groups))
    return interval(ratio_or_zero(cov_B22[:, 0, 1], np.sqrt(cov_B22[:, 0, 0] * cov_B22[:, 1, 1])))
