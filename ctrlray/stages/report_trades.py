"""Tables of what attributes have to do with each other: trade-offs, entanglement, slopes, and the means per level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctrlray.metrics.bootstrap import Interval
from ctrlray.metrics.entanglement import off_diagonal, relative_to_pool
from ctrlray.stages.report_numbers import interval, point
from ctrlray.stages.report_tables import Cell, Table, metric_cell, number_cell, table


def trade_table(attributes: Sequence[str], metrics: Mapping[str, Any]) -> Table | None:
    """What the settings of each method reach together."""
    shown = {m: r for m, r in metrics.items() if r.get("pareto")}
    if not shown or len(attributes) < 2:
        return None
    rows = [
        [
            Cell(m, method=m),
            *(number_cell(r["pareto"].get(k)) for k in ("hypervolume", "mean_inner_product")),
            number_cell(r["pareto"].get("sparsity"), 4),
            *(number_cell((r.get("cosa") or {}).get(a)) for a in attributes),
        ]
        for m, r in shown.items()
    ]
    kept = (f"CoSA, {a} to be kept" for a in attributes)
    header = ("Method", "Hypervolume (1 is all)", "Mean inner product", "Sparsity", *kept)
    return table("Trade-offs, in quantiles of the data pool", header, rows)


def entanglement_table(metrics: Mapping[str, Any], pool_slopes: Any) -> Table | None:
    """How far the dials move each other, relative to the data pool, and where the steering error comes from."""
    shown = {m: r for m, r in metrics.items() if point((r.get("entanglement") or {}).get("off_diagonal")) is not None}
    if not shown:
        return None
    pool = _intervals(pool_slopes)
    rows = [_pool_row(pool)] if pool else []
    rows += [_entangled_row(m, r, pool) for m, r in shown.items()]
    header = (
        "Method",
        "Sideways, levels per level asked for",
        "Index: sideways per level moved",
        "Index relative to the pool's",
        "Index, length held constant",
        "Steering error, levels",
        "Miscalibration",
        "Orthogonality",
    )
    return table("Entanglement and steerability, with 95% intervals; 0 is best in every column", header, rows)


def _entangled_row(method: str, result: Mapping[str, Any], pool: Sequence[Sequence[Interval]]) -> list[Cell]:
    index, steered = result["entanglement"].get("index"), result.get("steerability") or {}
    found = interval(index)
    return [
        Cell(method, method=method),
        number_cell(result["entanglement"]["off_diagonal"]),
        number_cell(index),
        _below_one(relative_to_pool(Interval(*found), pool).as_json() if found and pool else None),
        number_cell((result.get("entanglement_length_adjusted") or {}).get("index")),
        *(number_cell(steered.get(k)) for k in ("error", "miscalibration", "orthogonality")),
    ]


def _pool_row(pool: Sequence[Sequence[Interval]]) -> list[Cell]:
    """What the data's own slopes come to; their diagonal is 1, so sideways and index are the same, and nothing is steered."""
    sideways = float(off_diagonal(np.array([[[entry.value for entry in row] for row in pool]]))[0])
    return [Cell("data pool"), *[number_cell(sideways)] * 2, *[number_cell(None)] * 5]


def _below_one(value: Any) -> Cell:
    """Green where the whole interval lies below 1: further apart than the data."""
    cell = metric_cell(value, 1.0)
    return replace(cell, tone={"good": "bad", "bad": "good"}.get(cell.tone, cell.tone))


def _intervals(matrix: Any) -> list[list[Interval]]:
    """A slope matrix of numbers or of JSON intervals, as intervals; empty where an entry is missing."""
    if not matrix or any(point(v) is None for row in matrix for v in row):
        return []
    return [[Interval(float(point(v) or 0.0), math.nan, math.nan) for v in row] for row in matrix]


def level_table(attribute: str, metrics: Mapping[str, Any]) -> Table:
    """Mean achieved units per requested level: the numbers of the requested-vs-achieved plot."""
    means = {m: level_means(r, attribute) for m, r in metrics.items()}
    levels = sorted({level for per in means.values() for level in per})
    rows = [[Cell(m, method=m), *(number_cell(per.get(k)) for k in levels)] for m, per in means.items() if per]
    return table(f"Mean achieved {attribute} per requested level", ("Method", *map(str, levels)), rows)


def level_means(result: Mapping[str, Any], attribute: str) -> dict[int, Any]:
    """Level -> interval, with whole numbers as keys whatever JSON made of them."""
    return {int(k): v for k, v in ((result.get("level_means") or {}).get(attribute) or {}).items()}


def slope_table(name: str, attributes: Sequence[str], slopes: Sequence[Sequence[Any]], *, length: bool = False) -> Table:
    """Slopes as numbers, rows requested, columns achieved."""
    rows = [
        [Cell(f"requested {a}"), *map(number_cell, row)]
        for a, row in zip(attributes, slopes, strict=False)
    ]
    held = ", length held constant" if length else ""
    return table(f"{name}: levels achieved per level requested{held}", ("", *attributes), rows)


def single_slope_table(attribute: str, slopes: Mapping[str, Any], adjusted: Mapping[str, Any]) -> Table:
    """One attribute has no matrix: a row per method instead."""

    def cell(matrix: Any) -> Cell:
        return number_cell(matrix[0][0] if matrix and matrix[0] else None)

    rows = [[Cell(m), cell(matrix), cell(adjusted.get(m))] for m, matrix in slopes.items()]
    return table(f"{attribute}: levels achieved per level requested", ("", "as it is", "length held constant"), rows)
