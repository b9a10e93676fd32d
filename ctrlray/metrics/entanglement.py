"""How far one dial moves another: slopes of all scores on all settings, and what answer length explains of them.

Shapes, units and the meaning of `weights_BP` are those of `ctrlray.metrics.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ctrlray.errors import DataError
from ctrlray.metrics.bootstrap import (
    DIGITS,
    Floats,
    Interval,
    Ints,
    centre,
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
