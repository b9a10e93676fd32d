"""All statistics of the evaluation grid, method by method, each with its bootstrap interval over prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ctrlray import config
from ctrlray.metrics import pareto, texts
from ctrlray.metrics.bootstrap import Floats, Interval, interval, matrix_json, weighted_mean
from ctrlray.metrics.control import (
    bias,
    kendall_level_means,
    level_means,
    mae,
    monotone_prompts,
    pairwise_order,
    spearman_level_means,
    spearman_rows,
)
from ctrlray.metrics.entanglement import entanglement_index, length_adjusted, off_diagonal, slopes, steering
from ctrlray.metrics.rows import BASELINES, Rows, rows_of

END_WIDTH = 0.25
Json = dict[str, float | None]


def evaluate_grid(grid: pa.Table, control: config.Control, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """All statistics of the grid, JSON-ready, by method (the starting model and prompting first, then by name).

    Rows without a finite score in every attribute are left out of the score statistics; `num_excluded` counts them.
    Methods over the same prompts share their resamples. A column `model` (see `ctrlray.metrics.rows`) keeps the answers of
    several models of one method apart: each prompt then counts once for each. Intervals are `{"value", "low", "high"}`, null
    where undefined.
    """
    methods = rows_of(grid, control)
    sources = _sources(methods.get(BASELINES[0]))
    return {m: _evaluate_method(rows, sources, control, num_bootstrap, seed) for m, rows in methods.items()}


def _evaluate_method(
    rows: Rows, sources: Mapping[str, Floats], control: config.Control, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    weights_BP = rows.draws(num_bootstrap, seed)
    adjusted_NA = length_adjusted(rows.units_NA, rows.num_tokens_N, rows.prompt_N)
    slopes_BAA = slopes(rows.requested_NA, rows.units_NA, rows.prompt_N, weights_BP)
    adjusted_BAA = slopes(rows.requested_NA, adjusted_NA, rows.prompt_N, weights_BP)
    attributes, means = {}, {}
    for i, attribute in enumerate(control.attributes):
        attributes[attribute.name] = {
            **_attribute(rows, rows.units_NA, i, weights_BP),
            "at_extremes": _share_at_ends(rows.units_NA[:, i], attribute.levels),
            "length_adjusted": _attribute(rows, adjusted_NA, i, weights_BP),
        }
        levels, means_BL = level_means(rows.requested_NA[:, i], rows.units_NA[:, i], rows.prompt_N, weights_BP)
        means[attribute.name] = {str(level): _json(means_BL[:, k]) for k, level in enumerate(levels)}
    return {
        "num_rows": len(rows.prompt_N),
        "num_excluded": rows.num_all - len(rows.prompt_N),
        "num_prompts": rows.num_distinct,
        "mean_tokens": rows.mean_tokens,
        "finished": rows.finished,
        "attributes": attributes,
        "slopes": matrix_json(slopes_BAA),
        "slopes_length_adjusted": matrix_json(adjusted_BAA),
        "entanglement": _entanglement(slopes_BAA),
        "entanglement_length_adjusted": _entanglement(adjusted_BAA),
        "level_means": means,
        "cells": _cells(rows, control, weights_BP),
        "pareto": _pareto(rows, control, weights_BP),
        "cosa": _cosa(rows, control, weights_BP),
        "steerability": _steerability(rows, sources, weights_BP),
        "texts": _texts(rows, weights_BP),
        "distinct_outputs": rows.distinct_outputs,
    }


def _json(values_B: Floats) -> Json:
    return interval(values_B).as_json()


def _attribute(rows: Rows, units_NA: Floats, i: int, weights_BP: Floats) -> dict[str, Any]:
    arguments = (rows.requested_NA[:, i], units_NA[:, i], rows.prompt_N, weights_BP)
    return {
        "mae": _json(mae(*arguments)),
        "bias": _json(bias(*arguments)),
        "spearman_rows": _json(spearman_rows(*arguments)),
        "spearman_level_means": _json(spearman_level_means(*arguments)),
        "kendall_level_means": _json(kendall_level_means(*arguments)),
        "monotone_prompts": _json(monotone_prompts(*arguments)),
        "pairwise": _json(pairwise_order(rows.requested_NA, units_NA[:, i], i, rows.prompt_N, weights_BP)),
    }


def _entanglement(slopes_BAA: Floats) -> dict[str, Json]:
    return {"off_diagonal": _json(off_diagonal(slopes_BAA)), "index": _json(entanglement_index(slopes_BAA))}


def _cells(rows: Rows, control: config.Control, weights_BP: Floats) -> list[dict[str, Any]]:
    """Per setting: its levels, how many rows it has, and the mean units of each attribute."""
    cells_CA, counts_C, means_BCA = pareto.cell_means(rows.requested_NA, rows.units_NA, rows.prompt_N, weights_BP)
    return [
        {
            "levels": cell.tolist(),
            "count": int(counts_C[c]),
            "units": {a.name: _json(means_BCA[:, c, i]) for i, a in enumerate(control.attributes)},
        }
        for c, cell in enumerate(cells_CA)
    ]


def _pareto(rows: Rows, control: config.Control, weights_BP: Floats) -> dict[str, Json]:
    levels = [a.levels for a in control.attributes]
    shares_NA = pareto.shares(rows.units_NA, levels)
    cells_CA, _, points_BCA = pareto.cell_means(rows.requested_NA, shares_NA, rows.prompt_N, weights_BP)
    few = pareto.affordable_draws(len(weights_BP), *cells_CA.shape)
    return {
        "hypervolume": _json(pareto.hypervolume(points_BCA[:few])),
        "mean_inner_product": _json(pareto.mean_inner_product(cells_CA, points_BCA, levels)),
        "sparsity": _json(pareto.sparsity(points_BCA)),
    }


def _cosa(rows: Rows, control: config.Control, weights_BP: Floats) -> dict[str, Json]:
    """Each attribute as the one whose setting must be kept; empty with one attribute, as nothing is left to be helpful."""
    if len(control.attributes) < 2:
        return {}
    shares_NA = pareto.shares(rows.units_NA, [a.levels for a in control.attributes])
    found = {}
    for i, attribute in enumerate(control.attributes):
        score_N = pareto.cosa_rows(rows.requested_NA[:, i], rows.units_NA[:, i], np.delete(shares_NA, i, axis=1))
        found[attribute.name] = _json(weighted_mean(score_N, rows.prompt_N, weights_BP))
    return found


def _sources(start: Rows | None) -> dict[str, Floats]:
    """Per prompt the mean units of the starting model's answers; empty where it was not evaluated."""
    if start is None:
        return {}
    return {p: start.units_NA[start.prompt_N == i].mean(axis=0) for i, p in enumerate(start.prompts)}


def _steerability(rows: Rows, sources: Mapping[str, Floats], weights_BP: Floats) -> dict[str, Json]:
    kept: Sequence[int] = [i for i, p in enumerate(rows.prompt_N) if rows.prompts[p] in sources]
    if not kept:
        nothing = Interval(math.nan, math.nan, math.nan).as_json()
        return {"error": nothing, "miscalibration": nothing, "orthogonality": nothing}
    prompt_N = rows.prompt_N[kept]
    source_NA = np.stack([sources[rows.prompts[p]] for p in prompt_N])
    parts = steering(rows.requested_NA[kept], rows.units_NA[kept], source_NA)
    return {
        "error": _json(weighted_mean(parts.error_N, prompt_N, weights_BP)),
        "miscalibration": _json(weighted_mean(parts.miscalibration_N, prompt_N, weights_BP)),
        "orthogonality": _json(weighted_mean(parts.orthogonality_N, prompt_N, weights_BP)),
    }


def _texts(rows: Rows, weights_BP: Floats) -> dict[str, Json]:
    where = (rows.prompt_N, rows.num_prompts)
    words_N = [texts.words(t) for t in rows.texts]
    return {
        "tokens": _json(weighted_mean(rows.num_tokens_N, rows.prompt_N, weights_BP)),
        "distinct_1": _json(texts.distinct(words_N, *where, 1).mean(weights_BP)),
        "distinct_2": _json(texts.distinct(words_N, *where, 2).mean(weights_BP)),
        "repetition": _json(texts.repetition(words_N, *where).mean(weights_BP)),
        "refused": _json(texts.refused(rows.texts, *where).mean(weights_BP)),
    }


def _share_at_ends(units_N: Floats, num_levels: int) -> float:
    """Share of units within 0.25 of the scale's ends, 0.5 and L + 0.5."""
    at_ends = (units_N <= 0.5 + END_WIDTH) | (units_N >= num_levels + 0.5 - END_WIDTH)
    return float(at_ends.mean())
