"""How well a dial works: statistics of the evaluation grid, each with a bootstrap interval over prompts.

Every statistic is a pure function of row arrays and of `weights_BP`, how often each of B draws holds each prompt. The
first draw is the data itself (all ones), the others resample prompts with replacement; so one formula gives value and
interval, and most need only per-prompt sums. Nothing is read or written here.

Shape key: N rows, P prompts, A attributes, L levels, B draws. `prompt_N` holds prompt numbers 0..P-1. *Units* are
achieved scores in continuous level units (`distill.Levels.units`): units minus requested level is an error in levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ctrlray import config, schema
from ctrlray.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COVERAGE = (2.5, 97.5)
DIGITS = 10  # finer differences are rounding noise, which must not order equal means or exclude zero
END_WIDTH = 0.25
MAX_AT_ENDS = 0.8
MAX_TRUNCATED = 0.3
MAX_IMBALANCE = 1.5
MIN_CHANGED = 0.1
CHUNK_CELLS = 4_000_000
BASELINES = ("start", "prompting")


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


def weighted_mean(values_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Mean of a value over the rows of each draw: sum_p w_p sum_{n in p} v_n / sum_p w_p |p|."""
    num_prompts = weights_BP.shape[1]
    sums = np.bincount(prompt_N, values_N, minlength=num_prompts)
    counts = np.bincount(prompt_N, minlength=num_prompts)
    return _divide(weights_BP @ sums, weights_BP @ counts)


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
    return _correlation(levels_BL.astype(np.float64), np.where(known_BL, ranks_BL, 0.0), known_BL.astype(np.float64))


def spearman_rows(requested_N: Floats, units_N: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """Rank correlation of requested levels with units over all rows, ties at mean rank; 0 where one is constant.

    A resample counts a prompt's rows several times: a value's rank is then (count below) + (count equal + 1) / 2.
    """
    size = max(1, CHUNK_CELLS // max(1, len(units_N)))
    parts = []
    for start in range(0, len(weights_BP), size):
        weights_BN = weights_BP[start : start + size, prompt_N]
        parts.append(_correlation(_mid_ranks(requested_N, weights_BN), _mid_ranks(units_N, weights_BN), weights_BN))
    return np.concatenate(parts)


def pairwise_order(requested_NA: Floats, units_N: Floats, axis: int, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """P(units at the higher setting > units at the lower | same prompt, same other levels); chance 0.5.

    All pairs of answers to one prompt that differ in this attribute's setting alone, over all samples of both settings.
    An equal score counts one half, so a method that ignores its setting has exactly 0.5. NaN without any such pair.
    """
    num_prompts = weights_BP.shape[1]
    wins, pairs = np.zeros(num_prompts), np.zeros(num_prompts)
    others_NA = np.delete(requested_NA, axis, axis=1)
    for p, rows in _rows_by_prompt(prompt_N):
        level, units, others = requested_NA[rows, axis], units_N[rows], others_NA[rows]
        same = (others[:, None, :] == others[None, :, :]).all(axis=2)
        is_pair = same & (level[:, None] > level[None, :])
        score = (units[:, None] > units[None, :]) + 0.5 * (units[:, None] == units[None, :])
        wins[p], pairs[p] = score[is_pair].sum(), is_pair.sum()
    return _divide(weights_BP @ wins, weights_BP @ pairs)


def slopes(requested_NA: Floats, units_NA: Floats, prompt_N: Ints, weights_BP: Floats) -> Floats:
    """slopes_BAA[., i, j]: levels of attribute j achieved per level of i requested, other settings held fixed.

    Multivariate least squares (X'X)^+ X'Y with settings X and units Y, both centred within each prompt. The diagonal is
    1 for a perfect dial; off the diagonal stands entanglement. A setting that never varies has slope 0.
    """
    num_prompts = weights_BP.shape[1]
    x_NA, y_NA = centre(requested_NA, prompt_N, num_prompts), centre(units_NA, prompt_N, num_prompts)
    xx, xy = _products(x_NA, x_NA, prompt_N, num_prompts), _products(x_NA, y_NA, prompt_N, num_prompts)
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


def centre(values_NA: Floats, prompt_N: Ints, num_prompts: int) -> Floats:
    """Subtract each prompt's mean. Equal values give exact zeros, not rounding noise that could pass for an effect."""
    first = np.zeros(num_prompts, np.int64)
    first[prompt_N[::-1]] = np.arange(len(prompt_N))[::-1]
    shifted = values_NA - values_NA[first[prompt_N]]
    counts = np.maximum(np.bincount(prompt_N, minlength=num_prompts), 1)
    means = np.column_stack([np.bincount(prompt_N, c, minlength=num_prompts) / counts for c in shifted.T])
    return np.asarray(shifted - means[prompt_N])


def pool_slopes(
    units: ArrayLike, prompt_ids: Sequence[str], num_bootstrap: int = 1000, seed: int = 0
) -> list[list[dict[str, float | None]]]:
    """The data pool's natural entanglement, JSON-ready like a method's `slopes`; `units` is [answers, A].

    Entry [i][j] is the slope of attribute j's units on attribute i's alone, both centred within prompts:
    cov(u_i, u_j) / var(u_i); 1 on the diagonal, 0 where u_i never varies within a prompt.
    """
    units_NA = np.asarray(units, np.float64)
    prompt_N, num_prompts = _numbers(prompt_ids, len(units_NA), "pool_slopes")
    weights_BP = draws(num_prompts, num_bootstrap, seed)
    y_NA = centre(units_NA, prompt_N, num_prompts)
    cov_BAA = np.einsum("bp,pij->bij", weights_BP, _products(y_NA, y_NA, prompt_N, num_prompts))
    var_BA = np.diagonal(cov_BAA, axis1=1, axis2=2)
    matrix_BAA = np.divide(cov_BAA, var_BA[:, :, None], out=np.zeros_like(cov_BAA), where=var_BA[:, :, None] > 0)
    return _matrix_json(matrix_BAA)


def code_gap(right: ArrayLike, wrong: ArrayLike, prompt_ids: Sequence[str], num_bootstrap: int = 1000, seed: int = 0) -> Interval:
    """Mean over examples of NLL under wrong codes minus NLL under the right one; above zero, the model reads its code.

    In nats per token. Whole prompts are resampled, so examples that share one count as a cluster.
    """
    gaps_N = np.asarray(wrong, np.float64) - np.asarray(right, np.float64)
    if not np.isfinite(gaps_N).all():
        raise DataError(f"code_gap: {int((~np.isfinite(gaps_N)).sum())} NLLs are not finite; training has diverged")
    prompt_N, num_prompts = _numbers(prompt_ids, len(gaps_N), "code_gap")
    return interval(weighted_mean(gaps_N, prompt_N, draws(num_prompts, num_bootstrap, seed)))


def correlation_within(x: ArrayLike, y: ArrayLike, groups: Sequence[str], num_bootstrap: int = 1000, seed: int = 0) -> Interval:
    """Pearson correlation of x and y, both centred within their group; 0 where one is constant. Resamples groups."""
    pair_N2 = np.column_stack([np.asarray(x, np.float64), np.asarray(y, np.float64)])
    if not np.isfinite(pair_N2).all():
        raise DataError("correlation_within: values must be finite; leave quarantined rows out")
    group_N, num_groups = _numbers(groups, len(pair_N2), "correlation_within")
    centred = centre(pair_N2, group_N, num_groups)
    weights_BP = draws(num_groups, num_bootstrap, seed)
    cov_B22 = np.einsum("bp,pij->bij", weights_BP, _products(centred, centred, group_N, num_groups))
    return interval(_ratio_or_zero(cov_B22[:, 0, 1], np.sqrt(cov_B22[:, 0, 0] * cov_B22[:, 1, 1])))


@dataclass(frozen=True)
class Rows:
    """One method's rows of the grid that have a score for every attribute."""

    prompt_N: Ints
    requested_NA: Floats
    units_NA: Floats
    num_tokens_N: Floats
    num_prompts: int


def evaluate_grid(grid: pa.Table, control: config.Control, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """All statistics of the grid, JSON-ready, by method (the starting model and prompting first, then by name).

    Rows without a finite score in every attribute are left out of the score statistics; `num_excluded` counts them.
    Methods over the same prompts share their resamples. Intervals are `{"value", "low", "high"}`, null where undefined.
    """
    names = [a.name for a in control.attributes]
    per = [f"{kind}_{a}" for a in names for kind in ("requested", "units")]
    needed = ["prompt_id", "method", "sample", "text", "num_tokens", "finish_reason", *per]
    schema.require_columns(grid.column_names, *needed, stage="evaluate")
    if not grid.num_rows:
        raise DataError("evaluate: the grid is empty; rerun the evaluate stage")
    keys = ["method", "prompt_id", *(f"requested_{a}" for a in names), "sample", "text"]
    ordered = grid.select(needed).sort_by([(k, "ascending") for k in keys])
    methods = ordered["method"].to_pylist()
    found = {}
    for method in sorted(set(methods), key=lambda m: (m != BASELINES[0], m != BASELINES[1], m)):
        rows = ordered.filter(pa.array([m == method for m in methods]))
        found[method] = _evaluate_method(rows, method, control, num_bootstrap, seed)
    return found


def _evaluate_method(table: pa.Table, method: str, control: config.Control, num_bootstrap: int, seed: int) -> dict[str, Any]:
    names = [a.name for a in control.attributes]
    rows = _rows(table, names, method)
    weights_BP = draws(rows.num_prompts, num_bootstrap, seed)
    adjusted_NA = length_adjusted(rows.units_NA, rows.num_tokens_N, rows.prompt_N)
    attributes, means = {}, {}
    for i, attribute in enumerate(control.attributes):
        attributes[attribute.name] = {
            **_attribute(rows, rows.units_NA, i, weights_BP),
            "at_extremes": _share_at_ends(rows.units_NA[:, i], attribute.levels),
            "length_adjusted": _attribute(rows, adjusted_NA, i, weights_BP),
        }
        levels, means_BL = level_means(rows.requested_NA[:, i], rows.units_NA[:, i], rows.prompt_N, weights_BP)
        means[attribute.name] = {str(level): interval(means_BL[:, k]).as_json() for k, level in enumerate(levels)}
    finish = table["finish_reason"].to_pylist()
    return {
        "num_rows": len(rows.prompt_N),
        "num_excluded": table.num_rows - len(rows.prompt_N),
        "num_prompts": rows.num_prompts,
        "mean_tokens": float(table["num_tokens"].to_numpy().mean()),
        "finished": sum(f in schema.FINISHED for f in finish) / len(finish),
        "attributes": attributes,
        "slopes": _matrix_json(slopes(rows.requested_NA, rows.units_NA, rows.prompt_N, weights_BP)),
        "slopes_length_adjusted": _matrix_json(slopes(rows.requested_NA, adjusted_NA, rows.prompt_N, weights_BP)),
        "level_means": means,
        "distinct_outputs": distinct_outputs(table, names),
    }


def _attribute(rows: Rows, units_NA: Floats, i: int, weights_BP: Floats) -> dict[str, Any]:
    arguments = (rows.requested_NA[:, i], units_NA[:, i], rows.prompt_N, weights_BP)
    return {
        "mae": interval(mae(*arguments)).as_json(),
        "bias": interval(bias(*arguments)).as_json(),
        "spearman_rows": interval(spearman_rows(*arguments)).as_json(),
        "spearman_level_means": interval(spearman_level_means(*arguments)).as_json(),
        "pairwise": interval(pairwise_order(rows.requested_NA, units_NA[:, i], i, rows.prompt_N, weights_BP)).as_json(),
    }


def distinct_outputs(table: pa.Table, names: Sequence[str]) -> float:
    """Share of prompts whose settings do not all give the same text (of several samples, the same texts in any order).

    Tells of a dial that does nothing only under greedy sampling: sampled texts differ by chance.
    """
    texts: dict[str, dict[tuple[int, ...], list[str]]] = {}
    requested = [table[f"requested_{a}"].to_pylist() for a in names]
    rows = zip(table["prompt_id"].to_pylist(), table["text"].to_pylist(), *requested, strict=True)
    for prompt, text, *setting in rows:
        texts.setdefault(prompt, {}).setdefault(tuple(setting), []).append(text)
    changed = [len({tuple(sorted(t)) for t in by_setting.values()}) > 1 for by_setting in texts.values()]
    return sum(changed) / len(changed)


def alarms(
    metrics: Mapping[str, Any],
    cells_before: Mapping[str, int],
    cells_after: Mapping[str, int],
    strategy: str,
    control: config.Control,
) -> list[dict[str, str]]:
    """What to know before believing the numbers: name, severity (error, warning, info) and detail of each."""
    found = _cell_alarms(cells_before, cells_after, strategy, control)
    for method, result in metrics.items():
        found += _method_alarms(method, result)
    return found


def _method_alarms(method: str, result: Mapping[str, Any]) -> list[dict[str, str]]:
    found = []
    changed = result["distinct_outputs"]
    if method != BASELINES[0] and changed < MIN_CHANGED:
        detail = f"{method}: in {_percent(1 - changed)} of the prompts every setting gives the same answer."
        found.append(_alarm("settings do not change the output", "error", detail))
    for name, measured in result["attributes"].items():
        share = measured["at_extremes"]
        if share > MAX_AT_ENDS:
            detail = f"{method}: {_percent(share)} of the {name} scores lie within {END_WIDTH} of the scale's ends."
            found.append(_alarm("answers collapse to the extremes", "warning", detail))
    if 1 - result["finished"] > MAX_TRUNCATED:
        detail = f"{method}: {_percent(1 - result['finished'])} of the answers were cut off at max_tokens."
        found.append(_alarm("most answers truncated", "warning", detail))
    return found


def _cell_alarms(
    before: Mapping[str, int], after: Mapping[str, int], strategy: str, control: config.Control
) -> list[dict[str, str]]:
    grid = [",".join(map(str, c)) for c in itertools.product(*(range(1, a.levels + 1) for a in control.attributes))]
    names = ", ".join(a.name for a in control.attributes)
    unreached = [c for c in grid if not before.get(c)]
    emptied = [c for c in grid if before.get(c) and not after.get(c)]
    found = []
    if unreached:
        found.append(_alarm("empty cell", "warning", f"No answer has these levels of {names}: {_listed(unreached)}."))
    if emptied:
        detail = f"Answers exist, but strategy {strategy} keeps none at these levels of {names}: {_listed(emptied)}."
        found.append(_alarm("empty cell", "info" if strategy in ("extremes", "moec") else "warning", detail))
    counts = [n for n in after.values() if n]
    expected_empty = unreached if strategy == "moec" else unreached + emptied
    if strategy in ("balance", "moec") and counts:
        ratio = max(counts) / min(counts)
        if ratio > MAX_IMBALANCE or expected_empty:
            detail = f"The fullest cell has {max(counts)} examples, the smallest {min(counts)} ({ratio:.1f} times fewer)"
            detail += f"; {len(expected_empty)} of {len(grid)} cells are empty." if expected_empty else "."
            found.append(_alarm("cells unbalanced after balance", "warning", detail))
    return found


def _alarm(name: str, severity: str, detail: str) -> dict[str, str]:
    return {"name": name, "severity": severity, "detail": detail}


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _listed(cells: Sequence[str], most: int = 9) -> str:
    more = f" and {len(cells) - most} more" if len(cells) > most else ""
    return "; ".join(cells[:most]) + more


def _share_at_ends(units_N: Floats, num_levels: int) -> float:
    """Share of units within 0.25 of the scale's ends, 0.5 and L + 0.5."""
    at_ends = (units_N <= 0.5 + END_WIDTH) | (units_N >= num_levels + 0.5 - END_WIDTH)
    return float(at_ends.mean())


def _rows(table: pa.Table, names: Sequence[str], method: str) -> Rows:
    for column in ("prompt_id", "num_tokens", *(f"requested_{a}" for a in names)):
        if table[column].null_count:
            raise DataError(f"evaluate: {table[column].null_count} rows of {method!r} have no {column}; rerun evaluate")
    units_NA = np.column_stack([_floats(table[f"units_{a}"]) for a in names])
    keep: NDArray[np.bool_] = np.asarray(np.isfinite(units_NA).all(axis=1))
    if not keep.any():
        raise DataError(f"evaluate: none of {len(keep)} rows of {method!r} has a score; look at the quarantine table")
    prompts = [p for p, k in zip(table["prompt_id"].to_pylist(), keep, strict=True) if k]
    prompt_N, num_prompts = _numbers(prompts, len(prompts), "evaluate")
    requested_NA = np.column_stack([_floats(table[f"requested_{a}"]) for a in names])
    return Rows(prompt_N, requested_NA[keep], units_NA[keep], _floats(table["num_tokens"])[keep], num_prompts)


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), np.float64)


def _numbers(keys: Sequence[str], num_rows: int, where: str) -> tuple[Ints, int]:
    if len(keys) != num_rows or not num_rows:
        raise DataError(f"{where}: needs one prompt id per row and at least one row, got {len(keys)} and {num_rows}")
    unique, numbers = np.unique(np.asarray(keys, dtype=str), return_inverse=True)
    return numbers.astype(np.int64), len(unique)


def _rows_by_prompt(prompt_N: Ints) -> list[tuple[int, Ints]]:
    order = np.argsort(prompt_N, kind="stable")
    starts = np.flatnonzero(np.diff(prompt_N[order], prepend=-1))
    return [(int(prompt_N[rows[0]]), rows) for rows in np.split(order, starts[1:])]


def _products(x_NA: Floats, y_NA: Floats, prompt_N: Ints, num_prompts: int) -> Floats:
    """sums_PAA: per prompt the sum over its rows of x_i y_j."""
    sums = np.zeros((num_prompts, x_NA.shape[1], y_NA.shape[1]))
    np.add.at(sums, prompt_N, x_NA[:, :, None] * y_NA[:, None, :])
    return sums


def _mid_ranks(values_N: Floats, weights_BN: Floats) -> Floats:
    """Mid-ranks of all rows in each draw, a row of weight w counting as w equal rows."""
    order = np.argsort(values_N, kind="stable")
    starts = np.flatnonzero(np.diff(values_N[order], prepend=-np.inf))
    mass = np.add.reduceat(weights_BN[:, order], starts, axis=1)
    ranks = np.cumsum(mass, axis=1) - mass / 2 + 0.5
    group_N = np.empty(len(values_N), np.int64)
    group_N[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values_N)))
    return np.asarray(ranks[:, group_N])


def _correlation(x_BN: Floats, y_BN: Floats, weights_BN: Floats) -> Floats:
    """Weighted Pearson correlation along the rows; 0 where x or y is constant."""
    total = weights_BN.sum(axis=1, keepdims=True)
    dx = x_BN - (weights_BN * x_BN).sum(axis=1, keepdims=True) / total
    dy = y_BN - (weights_BN * y_BN).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((weights_BN * dx**2).sum(axis=1) * (weights_BN * dy**2).sum(axis=1))
    return _ratio_or_zero((weights_BN * dx * dy).sum(axis=1), spread)


def _ratio_or_zero(top_B: Floats, bottom_B: Floats) -> Floats:
    return np.divide(top_B, bottom_B, out=np.zeros_like(top_B), where=bottom_B > 10.0**-DIGITS)


def _divide(top_B: Floats, bottom_B: Floats) -> Floats:
    return np.divide(top_B, bottom_B, out=np.full_like(top_B, np.nan), where=bottom_B > 0)


def _matrix_json(matrix_BAA: Floats) -> list[list[dict[str, float | None]]]:
    size = matrix_BAA.shape[1]
    return [[interval(matrix_BAA[:, i, j]).as_json() for j in range(size)] for i in range(size)]
