"""The bootstrap that all metrics share: draws of whole prompts, and the sums that make a statistic cheap over them.

Every statistic is a pure function of row arrays and of `weights_BP`, how often each of B draws holds each prompt. The
first draw is the data itself (all ones), the others resample prompts with replacement; so one formula gives value and
interval, and most need only per-prompt sums. Nothing is read or written in this package.

Shape key of the package: N rows, P prompts, A attributes, L levels, B draws. `prompt_N` holds prompt numbers 0..P-1.
*Units* are achieved scores in continuous level units (`distill.Levels.units`): units minus requested level is an error
in levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctrlray.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COVERAGE = (2.5, 97.5)
DIGITS = 10  # finer differences are rounding noise, which must not order equal means or exclude zero


class Interval(NamedTuple):
    """A value with its percentile bootstrap interval; NaN where it is undefined."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """`{"value", "low", "high"}`; null where undefined."""
        return {k: v if math.isfinite(v) else None for k, v in self._asdict().items()}


def draws(num_prompts: int, num_bootstrap: int, seed: int) -> Floats:
    """weights_BP: ones for the data itself, then `num_bootstrap` resamples of the prompts with replacement."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_bootstrap)
    return np.vstack([np.ones(num_prompts), counts])


def interval(values_B: Floats) -> Interval:
    """The first draw's value, and the central 95% of the others; undefined draws are left out."""
    value, rest = float(values_B[0]), values_B[1:]
    rest = rest[np.isfinite(rest)]
    if not math.isfinite(value) or not rest.size:
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(rest, COVERAGE)
    return Interval(*(round(float(x), DIGITS) + 0.0 for x in (value, low, high)))  # + 0.0 turns -0.0 into 0.0


class Sums(NamedTuple):
    """A ratio's per-prompt parts: adding them over the prompts of a draw gives numerator and denominator."""

    top_P: Floats
    bottom_P: Floats

    def of(self, prompts: Ints) -> Sums:
        """The parts of some prompts, by number."""
        return Sums(self.top_P[prompts], self.bottom_P[prompts])

    def mean(self, weights_BP: Floats) -> Floats:
        """sum_p w_p top_p / sum_p w_p bottom_p of each draw; NaN where nothing was counted."""
        return divide(weights_BP @ self.top_P, weights_BP @ self.bottom_P)


def row_sums(values_N: Floats, prompt_N: Ints, num_prompts: int) -> Sums:
    """Per prompt the sum of a value over its rows and their number; rows where it is NaN are left out."""
    known = np.isfinite(values_N)
    sums = np.bincount(prompt_N[known], values_N[known], minlength=num_prompts)
    counts = np.bincount(prompt_N[known], minlength=num_prompts)
    return Sums(np.asarray(sums, np.float64), np.asarray(counts, np.float64))


def weighted_mean(values_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Mean of a value over the rows of each draw: sum_p w_p sum_{n in p} v_n / sum_p w_p |p|."""
    return row_sums(values_N, prompt_N, weights_BP.shape[1]).mean(weights_BP)


def centre(values_NA: Floats, prompt_N: Ints, num_prompts: int) -> Floats:
    """Subtract each prompt's mean. Equal values give exact zeros, not rounding noise that could pass for an effect."""
    first = np.zeros(num_prompts, np.int64)
    first[prompt_N[::-1]] = np.arange(len(prompt_N))[::-1]
    shifted = values_NA - values_NA[first[prompt_N]]
    counts = np.maximum(np.bincount(prompt_N, minlength=num_prompts), 1)
    means = np.column_stack([np.bincount(prompt_N, c, minlength=num_prompts) / counts for c in shifted.T])
    return np.asarray(shifted - means[prompt_N])


def products(x_NA: Floats, y_NA: Floats, prompt_N: Ints, num_prompts: int) -> Floats:
    """sums_PAA: per prompt the sum over its rows of x_i y_j."""
    sums = np.zeros((num_prompts, x_NA.shape[1], y_NA.shape[1]))
    np.add.at(sums, prompt_N, x_NA[:, :, None] * y_NA[:, None, :])
    return sums


def numbers(keys: Sequence[str], num_rows: int, where: str) -> tuple[Ints, int]:
    """Number the distinct keys 0..P-1 in alphabetical order: prompt_N and P. Raises DataError unless each row has a key."""
    if len(keys) != num_rows or not num_rows:
        raise DataError(f"{where}: needs one prompt id per row and at least one row, got {len(keys)} and {num_rows}")
    unique, numbers = np.unique(np.asarray(keys, dtype=str), return_inverse=True)
    return numbers.astype(np.int64), len(unique)


def rows_by_prompt(prompt_N: Ints) -> list[tuple[int, Ints]]:
    """Each prompt's number with the indices of its rows, in rising order."""
    order = np.argsort(prompt_N, kind="stable")
    starts = np.flatnonzero(np.diff(prompt_N[order], prepend=-1))
    return [(int(prompt_N[rows[0]]), rows) for rows in np.split(order, starts[1:])]


def correlation(x_BN: Floats, y_BN: Floats, weights_BN: Floats) -> Floats:
    """Weighted Pearson correlation along the rows; 0 where x or y is constant."""
    total = weights_BN.sum(axis=1, keepdims=True)
    dx = x_BN - (weights_BN * x_BN).sum(axis=1, keepdims=True) / total
    dy = y_BN - (weights_BN * y_BN).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((weights_BN * dx**2).sum(axis=1) * (weights_BN * dy**2).sum(axis=1))
    return ratio_or_zero((weights_BN * dx * dy).sum(axis=1), spread)


def ratio_or_zero(top_B: Floats, bottom_B: Floats) -> Floats:
    """Quotient; 0 where the denominator is rounding noise or less."""
    return np.divide(top_B, bottom_B, out=np.zeros_like(top_B), where=bottom_B > 10.0**-DIGITS)


def divide(top_B: Floats, bottom_B: Floats) -> Floats:
    """Quotient; NaN where nothing was counted."""
    return np.divide(top_B, bottom_B, out=np.full_like(top_B, np.nan), where=bottom_B > 0)


def matrix_json(matrix_BAA: Floats) -> list[list[dict[str, float | None]]]:
    """The interval of every entry, JSON-ready."""
    size = matrix_BAA.shape[1]
    return [[interval(matrix_BAA[:, i, j]).as_json() for j in range(size)] for i in range(size)]
