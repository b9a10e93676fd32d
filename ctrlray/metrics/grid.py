"""All statistics of the evaluation grid, method by method, each with its bootstrap interval over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ctrlray import config, schema
from ctrlray.errors import DataError
from ctrlray.metrics.bootstrap import Floats, Ints, draws, interval, matrix_json, numbers
from ctrlray.metrics.control import bias, level_means, mae, pairwise_order, spearman_level_means, spearman_rows
from ctrlray.metrics.entanglement import length_adjusted, slopes

END_WIDTH = 0.25
BASELINES = ("start", "prompting")


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
        "slopes": matrix_json(slopes(rows.requested_NA, rows.units_NA, rows.prompt_N, weights_BP)),
        "slopes_length_adjusted": matrix_json(slopes(rows.requested_NA, adjusted_NA, rows.prompt_N, weights_BP)),
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
    prompt_N, num_prompts = numbers(prompts, len(prompts), "evaluate")
    requested_NA = np.column_stack([_floats(table[f"requested_{a}"]) for a in names])
    return Rows(prompt_N, requested_NA[keep], units_NA[keep], _floats(table["num_tokens"])[keep], num_prompts)


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), np.float64)
