"""How well answers follow their setting: errors in levels, rank correlations and order within prompts.

Shapes, units and the meaning of `weights_BP` are those of `ctrlray.metrics.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ctrlray.errors import DataError
from ctrlray.metrics.bootstrap import (
    DIGITS,
    Floats,
    Interval,
    Ints,
    Sums,
    correlation,
    divide,
    draws,
    interval,
    numbers,
    ratio_or_zero,
    row_sums,
    rows_by_prompt,
    weighted_mean,
)

CHUNK_CELLS = 4_000_000


def mae(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Mean absolute error in levels: mean |units - requested|."""
    return weighted_mean(np.abs(units_N - requested_N), prompt_N, weights_BP)


def bias(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Mean error in levels: mean (units - requested); positive where answers overshoot."""
    return weighted_mean(units_N - requested_N, prompt_N, weights_BP)


def level_means(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> tuple[list[int], Floats]:
    """The requested levels in rising order, and means_BL: mean units at each, over prompts and the other levels."""
    levels = [int(level) for level in np.unique(requested_N)]
    masks = [requested_N == level for level in levels]
    return levels, np.column_stack([weighted_mean(units_N[m], prompt_N[m], weights_BP) for m in masks])


def spearman_level_means(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Rank correlation of the requested levels with the mean units at each; 0 where the means are equal.

    A level that a draw does not hold is left out of it.
    """
    _, means_BL = level_means(requested_N, units_N, prompt_N, weights_BP)
    means_BL = np.round(means_BL, DIGITS)
    ranks_BL = stats.rankdata(means_BL, axis=1, nan_policy="omit")
    known_BL = np.isfinite(means_BL)
    levels_BL = np.where(known_BL, np.cumsum(known_BL, axis=1), 0)
    return correlation(levels_BL.astype(np.float64), np.where(known_BL, ranks_BL, 0.0), known_BL.astype(np.float64))


def spearman_rows(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Rank correlation of requested levels with units over all rows, ties at mean rank; 0 where one is constant.

    A resample counts a prompt's rows several times: a value's rank is then (count below) + (count equal + 1) / 2.
    """
    size = max(1, CHUNK_CELLS // max(1, len(units_N)))
    parts = []
    for start in range(0, len(weights_BP), size):
        weights_BN = weights_BP[start : start + size, prompt_N]
        parts.append(correlation(_mid_ranks(requested_N, weights_BN), _mid_ranks(units_N, weights_BN), weights_BN))
    return np.concatenate(parts)


def kendall_level_means(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Kendall's tau-b of the requested levels with the mean units at each; 0 where the means are equal.

    (rising pairs - falling pairs) / sqrt(pairs (pairs - pairs of equal means)), over the pairs of levels that a draw
    holds (Kendall 1945; levels have no ties).
    """
    _, means_BL = level_means(requested_N, units_N, prompt_N, weights_BP)
    low, high = np.triu_indices(means_BL.shape[1], k=1)
    step_BQ = np.round(means_BL[:, high], DIGITS) - np.round(means_BL[:, low], DIGITS)
    known_BQ = np.isfinite(step_BQ)
    sign_BQ = np.sign(np.where(known_BQ, step_BQ, 0.0))
    pairs_B, moved_B = known_BQ.sum(axis=1), (sign_BQ != 0).sum(axis=1)
    return ratio_or_zero(sign_BQ.sum(axis=1), np.sqrt(pairs_B * moved_B))


def monotone_prompts(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Share of prompts whose mean units rise at every step from one requested level to the next.

    Means are over the other settings and samples. A step that stays level does not count as rising, so a method that
    ignores its setting has 0, and scores in random order have 1 / (number of levels)!. Prompts with one level are left out.
    """
    num_prompts = weights_BP.shape[1]
    levels = np.unique(requested_N)
    means_PL = np.column_stack([_prompt_means(units_N, requested_N == k, prompt_N, num_prompts) for k in levels])
    rises_P, counts_P = np.zeros(num_prompts), np.zeros(num_prompts)
    for p, means_L in enumerate(np.round(means_PL, DIGITS)):
        steps = np.diff(means_L[np.isfinite(means_L)])
        rises_P[p], counts_P[p] = steps.size > 0 and (steps > 0).all(), steps.size > 0
    return Sums(rises_P, counts_P).mean(weights_BP)


def order_sums(requested_NA: Floats, units_N: Floats, axis: int, prompt_N: Ints, num_prompts: int) -> Sums:
    """Per prompt the pairs that are in order (equal scores count one half), and all pairs; see `pairwise_order`."""
    wins, pairs = np.zeros(num_prompts), np.zeros(num_prompts)
    others_NA = np.delete(requested_NA, axis, axis=1)
    for p, rows in rows_by_prompt(prompt_N):
        level, units, others = requested_NA[rows, axis], units_N[rows], others_NA[rows]
        same = (others[:, None, :] == others[None, :, :]).all(axis=2)
        is_pair = same & (level[:, None] > level[None, :])
        score = (units[:, None] > units[None, :]) + 0.5 * (units[:, None] == units[None, :])
        wins[p], pairs[p] = score[is_pair].sum(), is_pair.sum()
    return Sums(wins, pairs)


def pairwise_order(requested_NA: Floats, units_N: Floats, axis: int, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """P(units at the higher setting > units at the lower | same prompt, same other levels); chance 0.5.

    All pairs of answers to one prompt that differ in this attribute's setting alone, over all samples of both settings.
    An equal score counts one half, so a method that ignores its setting has exactly 0.5. NaN without any such pair.
    """
    return order_sums(requested_NA, units_N, axis, prompt_N, weights_BP.shape[1]).mean(weights_BP)


def code_gap(right: ArrayLike, wrong: ArrayLike, prompt_ids: Sequence[str], num_bootstrap: int = 1000, seed: int = 0) -> Interval:
    """Mean over examples of NLL under wrong codes minus NLL under the right one; above zero, the model reads its code.

    In nats per token. Whole prompts are resampled, so examples that share one count as a cluster.
    """
    gaps_N = np.asarray(wrong, np.float64) - np.asarray(right, np.float64)
    if not np.isfinite(gaps_N).all():
        raise DataError(f"code_gap: {int((~np.isfinite(gaps_N)).sum())} NLLs are not finite; training has diverged")
    prompt_N, num_prompts = numbers(prompt_ids, len(gaps_N), "code_gap")
    return interval(weighted_mean(gaps_N, prompt_N, draws(num_prompts, num_bootstrap, seed)))


def _prompt_means(units_N: Floats, kept_N: NDArray[np.bool_], prompt_N: Ints, num_prompts: int) -> Floats:
    sums = row_sums(units_N[kept_N], prompt_N[kept_N], num_prompts)
    return divide(sums.top_P, sums.bottom_P)


def _mid_ranks(values_N: Floats, weights_BN: Floats) -> Floats:
    """Mid-ranks of all rows in each draw, a row of weight w counting as w equal rows."""
    order = np.argsort(values_N, kind="stable")
    starts = np.flatnonzero(np.diff(values_N[order], prepend=-np.inf))
    mass = np.add.reduceat(weights_BN[:, order], starts, axis=1)
    ranks = np.cumsum(mass, axis=1) - mass / 2 + 0.5
    group_N = np.empty(len(values_N), np.int64)
    group_N[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values_N)))
    return np.asarray(ranks[:, group_N])
