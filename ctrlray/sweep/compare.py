"""The comparison of a sweep's variants: what each measured, and how far it is from the base on the same prompts.

A variant is judged by the method that it exports. Differences are paired: variant and base answer the same held-out
prompts, one resample of prompts gives both statistics, and the interval is that of their difference. Statistics that depend
on how many levels an attribute has are compared only where that number is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ctrlray import config, schema
from ctrlray.metrics.bootstrap import Floats, Interval, Ints, draws, interval
from ctrlray.metrics.control import mae, pairwise_order, spearman_level_means
from ctrlray.metrics.entanglement import slopes
from ctrlray.pipeline import Run
from ctrlray.reporting import code_gaps
from ctrlray.sweep.plan import Plan
from ctrlray.sweep.run import Outcome, finished


class Rows(NamedTuple):
    """One variant's scored answers under the settings of its dial; `prompt_N` counts the prompts that variants share."""

    requested_NA: Floats
    units_NA: Floats
    prompt_N: Ints


class Statistic(NamedTuple):
    """One figure per attribute: its name for readers, its formula, and whether its scale depends on the number of levels."""

    title: str
    of: Callable[[Rows, int, Floats], Floats]
    per_levels: bool = False


def ends(rows: Rows, axis: int, weights_BP: Floats) -> Floats:
    """`pairwise_order` of the lowest against the highest setting alone: the same question for any number of levels."""
    levels_N = rows.requested_NA[:, axis]
    at_end = (levels_N == levels_N.min()) | (levels_N == levels_N.max())
    kept = Rows(rows.requested_NA[at_end], rows.units_NA[at_end], rows.prompt_N[at_end])
    return pairwise_order(kept.requested_NA, kept.units_NA[:, axis], axis, kept.prompt_N, weights_BP)


def _column(formula: Callable[[Floats, Floats, Ints, Floats], Floats]) -> Callable[[Rows, int, Floats], Floats]:
    return lambda rows, axis, weights: formula(rows.requested_NA[:, axis], rows.units_NA[:, axis], rows.prompt_N, weights)


STATISTICS: Mapping[str, Statistic] = {
    "pairwise": Statistic(
        "Pairwise order accuracy (chance 0.5)",
        lambda r, axis, w: pairwise_order(r.requested_NA, r.units_NA[:, axis], axis, r.prompt_N, w),
        per_levels=True,
    ),
    "ends": Statistic("Order accuracy, lowest against highest", ends),
    "mae": Statistic("Mean absolute error, levels (0 is best)", _column(mae), per_levels=True),
    "spearman_level_means": Statistic("Spearman of the level means", _column(spearman_level_means), per_levels=True),
    "slope": Statistic(
        "Slope of its own dial (1 is best)",
        lambda r, axis, w: slopes(r.requested_NA, r.units_NA, r.prompt_N, w)[:, axis, axis],
    ),
}


def compare(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Everything that the sweep's table and page show, JSON-ready."""
    found = {name: _variant(plan, name, outcomes[name]) for name in plan.jobs}
    done = [name for name, v in found.items() if v["state"] == "finished"]
    if plan.base in done:
        for name in done:
            if name != plan.base:
                _add_differences(plan.runs[name], plan.runs[plan.base], found[name]["attributes"])
    return {"sweep": plan.sweep.name, "base": plan.base, "root": plan.storage.uri, "variants": list(found.values())}


def _variant(plan: Plan, name: str, outcome: Outcome) -> dict[str, Any]:
    run = plan.runs[name]
    known = {"variant": name, "changes": plan.changes(name), "root": run.storage.uri, "error": outcome.error}
    if outcome.error or not finished(run):
        return known | {"state": "failed", "attributes": {}}
    method = exported(run.job)
    measured = run.out("evaluate").read_json("metrics.json")[method]
    return known | {
        "state": "finished",
        "method": method,
        "examples": (run.result("distill") or {})["rows_out"],
        "seconds": round(sum((run.result(s) or {})["seconds"] for s in ("distill", "train", "evaluate", "export")), 1),
        "code_gap": code_gaps(run).get(method),
        "mean_tokens": measured["mean_tokens"],
        "distinct_outputs": measured["distinct_outputs"],
        "slopes": measured["slopes"],
        "attributes": _statistics(run, method),
    }


def exported(job: config.Job) -> str:
    """The method by which a job is judged: the one whose model it exports."""
    return job.export.objective or job.train.objectives[-1].type


def _statistics(run: Run, method: str) -> dict[str, Any]:
    """Per attribute: its number of levels and every statistic with its interval."""
    grid = _grid(run, method)
    rows, count = rows_of(grid, _names(run), sorted(set(grid["prompt_id"].to_pylist())))
    weights_BP = draws(count, run.job.evaluate.bootstrap, run.job.seed)
    return {
        a.name: {"levels": a.levels}
        | {key: interval(s.of(rows, i, weights_BP)).as_json() for key, s in STATISTICS.items()}
        for i, a in enumerate(run.job.control.attributes)
    }


def _add_differences(run: Run, base: Run, found: dict[str, Any]) -> None:
    """Put `difference` beside each statistic of an attribute that the base has too; None where it would mean nothing."""
    names, theirs = _names(run), _names(base)
    grids = (_grid(run, exported(run.job)), _grid(base, exported(base.job)))
    shared = sorted(set(grids[0]["prompt_id"].to_pylist()) & set(grids[1]["prompt_id"].to_pylist()))
    rows = [rows_of(g, n, shared)[0] for g, n in zip(grids, (names, theirs), strict=True)]
    for name in names:
        found[name]["shared_prompts"] = len(shared)
        axes = (names.index(name), theirs.index(name)) if name in theirs else None
        same_levels = axes is not None and _levels(run, axes[0]) == _levels(base, axes[1])
        for key, s in STATISTICS.items():
            known = axes is not None and shared and (same_levels or not s.per_levels)
            weights = draws(len(shared), base.job.evaluate.bootstrap, base.job.seed) if known else None
            found[name][key]["difference"] = None if weights is None else difference(s, rows, axes, weights).as_json()


def difference(statistic: Statistic, rows: Sequence[Rows], axes: Any, weights_BP: Floats) -> Interval:
    """A statistic of the first rows minus that of the second, on the same resamples of their prompts."""
    mine, theirs = (statistic.of(r, axis, weights_BP) for r, axis in zip(rows, axes, strict=True))
    return interval(mine - theirs)


def rows_of(grid: pa.Table, names: Sequence[str], prompts: Sequence[str]) -> tuple[Rows, int]:
    """The rows of these prompts that have a score for every attribute, and how many prompts there are."""
    number = {p: i for i, p in enumerate(prompts)}
    prompt_N = np.array([number.get(p, -1) for p in grid["prompt_id"].to_pylist()], np.int64)
    requested_NA, units_NA = (
        np.column_stack([np.asarray(grid[f"{kind}_{n}"].to_numpy(), np.float64) for n in names])
        for kind in ("requested", "units")
    )
    kept = (prompt_N >= 0) & np.isfinite(units_NA).all(axis=1)
    return Rows(requested_NA[kept], units_NA[kept], prompt_N[kept]), len(prompts)


def _grid(run: Run, method: str) -> pa.Table:
    table = run.out("evaluate").read_table("grid", schema.grid(_names(run)))
    return table.filter(pa.array([m == method for m in table["method"].to_pylist()], pa.bool_()))


def _names(run: Run) -> list[str]:
    return [a.name for a in run.job.control.attributes]


def _levels(run: Run, axis: int) -> int:
    return run.job.control.attributes[axis].levels
