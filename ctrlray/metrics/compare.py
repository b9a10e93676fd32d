"""Whether one method follows its settings better than another: paired tests over the prompts that both answered.

A difference's interval comes from draws of prompts that both methods share, its p-value from a permutation test that
exchanges the two methods' answers prompt by prompt. Many p-values are corrected after Holm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ctrlray import config
from ctrlray.metrics.bootstrap import DIGITS, Floats, Sums, divide, draws, interval, row_sums
from ctrlray.metrics.control import order_sums
from ctrlray.metrics.rows import Rows, rows_of

PERMUTATIONS = 10_000
STATISTICS = ("pairwise", "mae")


def compare_grid(grid: pa.Table, control: config.Control, num_bootstrap: int, seed: int) -> list[dict[str, Any]]:
    """Every pair of methods, attribute and statistic: first minus second, JSON-ready.

    `{"first", "second", "attribute", "statistic", "num_prompts", "value", "low", "high", "p", "p_holm"}`. Holm's family is
    one statistic over all pairs and attributes. Pairs of methods that share no prompt are left out.
    """
    methods = rows_of(grid, control)
    wanted = list(itertools.product(enumerate(control.attributes), STATISTICS))
    sums = {(m, i, s): _sums(rows, s, i) for m, rows in methods.items() for (i, _), s in wanted}
    found: list[dict[str, Any]] = []
    for first, second in itertools.combinations(methods, 2):
        shared = sorted(set(methods[first].prompts) & set(methods[second].prompts))
        for (i, attribute), statistic in wanted if shared else ():
            a, b = (methods[m].by_prompt(sums[m, i, statistic], shared) for m in (first, second))
            named = {"first": first, "second": second, "attribute": attribute.name, "statistic": statistic}
            found.append(named | {"num_prompts": len(shared)} | _difference(a, b, num_bootstrap, seed))
    for statistic in STATISTICS:
        family = [f for f in found if f["statistic"] == statistic]
        for row, adjusted in zip(family, holm([f["p"] for f in family]), strict=True):
            row["p_holm"] = adjusted
    return found


def _sums(rows: Rows, statistic: str, attribute: int) -> Sums:
    requested_N, units_N = rows.requested_NA[:, attribute], rows.units_NA[:, attribute]
    if statistic == "mae":
        return row_sums(np.abs(units_N - requested_N), rows.prompt_N, rows.num_prompts)
    return order_sums(rows.requested_NA, units_N, attribute, rows.prompt_N, rows.num_prompts)


def _difference(first: Sums, second: Sums, num_bootstrap: int, seed: int) -> dict[str, float | None]:
    weights_BP = draws(len(first.top_P), num_bootstrap, seed)
    difference = interval(first.mean(weights_BP) - second.mean(weights_BP))
    return difference.as_json() | {"p": permutation_p(first, second, seed)}


def permutation_p(first: Sums, second: Sums, seed: int, num_permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of a difference in ratios, (1 + as extreme) / (1 + permutations); 1 where it is undefined.

    Under the null hypothesis the two methods' answers to a prompt can be exchanged: each permutation does so for a random
    half of the prompts (Fisher's randomisation test for paired samples; the + 1 keeps it valid, Phipson and Smyth 2010).
    A prompt must weigh as much whichever method answers it, or its difficulty would not cancel: each method's sums are taken
    as shares of all that it has counted, so that several answers per setting can be exchanged with a single one.
    """
    first, second = _scaled(first), _scaled(second)
    observed = float(_gap(first, second, np.zeros((1, len(first.top_P))))[0])
    if not np.isfinite(observed):
        return 1.0
    swapped_KP = np.random.default_rng(seed).integers(0, 2, (num_permutations, len(first.top_P))).astype(np.float64)
    gaps_K = _gap(first, second, swapped_KP)
    extreme = np.abs(np.nan_to_num(gaps_K)) >= abs(observed) - 10.0**-DIGITS
    return float((1 + extreme.sum()) / (1 + num_permutations))


def _scaled(sums: Sums) -> Sums:
    total = float(sums.bottom_P.sum())
    return Sums(sums.top_P / total, sums.bottom_P / total) if total else sums


def _gap(first: Sums, second: Sums, swapped_KP: Floats) -> Floats:
    """Difference of the two ratios where the prompts marked 1 are exchanged."""

    def mixed(a: Sums, b: Sums) -> Floats:
        top = swapped_KP @ (b.top_P - a.top_P) + a.top_P.sum()
        bottom = swapped_KP @ (b.bottom_P - a.bottom_P) + a.bottom_P.sum()
        return divide(top, bottom)

    return mixed(first, second) - mixed(second, first)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the smallest of m is multiplied by m, the next by m - 1; never falling, at most 1."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
