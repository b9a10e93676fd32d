"""The comparison of a sweep's variants: what each measured, and how far it is from the base on the same prompts.

A variant is judged by the method that it exports. Differences are paired: variant and base answer the same held-out
prompts, one resample of prompts gives both statistics, and the interval is that of their difference. p-values come from
`metrics.compare`'s permutation test; Holm's family is one statistic over all variants and attributes. Statistics that depend
on how many levels an attribute has are compared only where that number is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ctrlray import config, schema
from ctrlray.metrics import rows as grid_rows
from ctrlray.metrics.bootstrap import Floats, Ints, Sums, draws, interval, row_sums
from ctrlray.metrics.compare import holm, permutation_p
from ctrlray.metrics.control import order_sums, spearman_level_means
from ctrlray.metrics.entanglement import slopes
from ctrlray.pipeline import Run
from ctrlray.reporting import code_gaps
from ctrlray.sweep.plan import Plan
from ctrlray.sweep.run import Outcome, finished


class Rows(NamedTuple):
    """One variant's scored answers under the settings of its dial; `prompt_N` counts the prompts that are compared."""

    requested_NA: Floats
    units_NA: Floats
    prompt_N: Ints
    num_prompts: int


class Statistic(NamedTuple):
    """One figure per attribute, by `sums` of prompts where it is a ratio of such, else by `draws`."""

    title: str
    sums: Callable[[Rows, int], Sums] | None = None
    draws: Callable[[Rows, int, Floats], Floats] | None = None
    per_levels: bool = False
    """Its scale depends on the number of levels."""

    def of(self, rows: Rows, axis: int, weights_BP: Floats) -> Floats:
        """Its value in each draw of prompts."""
        if self.sums is not None:
            return self.sums(rows, axis).mean(weights_BP)
        assert self.draws is not None
        return self.draws(rows, axis, weights_BP)


def order(rows: Rows, axis: int) -> Sums:
    """Pairs of answers in order, over all levels."""
    return order_sums(rows.requested_NA, rows.units_NA[:, axis], axis, rows.prompt_N, rows.num_prompts)


def ends(rows: Rows, axis: int) -> Sums:
    """`order` of the lowest against the highest setting alone: the same question for any number of levels."""
    levels_N = rows.requested_NA[:, axis]
    at_end = (levels_N == levels_N.min()) | (levels_N == levels_N.max())
    return order(Rows(rows.requested_NA[at_end], rows.units_NA[at_end], rows.prompt_N[at_end], rows.num_prompts), axis)


def errors(rows: Rows, axis: int) -> Sums:
    """Absolute errors in levels."""
    return row_sums(np.abs(rows.units_NA[:, axis] - rows.requested_NA[:, axis]), rows.prompt_N, rows.num_prompts)


STATISTICS: Mapping[str, Statistic] = {
    "pairwise": Statistic("Pairwise order accuracy (chance 0.5)", sums=order, per_levels=True),
    "ends": Statistic("Order accuracy, lowest against highest", sums=ends),
    "mae": Statistic("Mean absolute error, levels (0 is best)", sums=errors, per_levels=True),
    "spearman_level_means": Statistic(
        "Spearman of the level means",
        draws=lambda r, axis, w: spearman_level_means(r.requested_NA[:, axis], r.units_NA[:, axis], r.prompt_N, w),
        per_levels=True,
    ),
    "slope": Statistic(
        "Slope of its own dial (1 is best)",
        draws=lambda r, axis, w: slopes(r.requested_NA, r.units_NA, r.prompt_N, w)[:, axis, axis],
    ),
}


def compare(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Everything that the sweep's table and page show, JSON-ready."""
    found = {name: _variant(plan, name, outcomes[name]) for name in plan.jobs}
    done = [name for name, v in found.items() if v["state"] == "finished"]
    if plan.base in done:
        others = {name: found[name]["attributes"] for name in done if name != plan.base}
        for name, attributes in others.items():
            _add_differences(plan.runs[name], plan.runs[plan.base], attributes)
        _correct(list(others.values()))
    return {"sweep": plan.sweep.name, "base": plan.base, "root": plan.storage.uri, "variants": list(found.values())}


def _variant(plan: Plan, name: str, outcome: Outcome) -> dict[str, Any]:
    run = plan.runs[name]
    known = {"variant": name, "changes": plan.changes(name), "root": run.storage.uri, "error": outcome.error}
    if outcome.error or not finished(run):
        return known | {"state": "failed", "attributes": {}}
    method = exported(run.job)
    rows = _grid(run)
    return known | {
        "state": "finished",
        "method": method,
        "examples": (run.result("distill") or {})["rows_out"],
        "seconds": round(sum((run.result(s) or {})["seconds"] for s in ("distill", "train", "evaluate", "export")), 1),
        "code_gap": code_gaps(run).get(method),
        "mean_tokens": rows.mean_tokens,
        "attributes": _statistics(run, among(rows, rows.prompts)),
    }


def exported(job: config.Job) -> str:
    """The method by which a job is judged: the one whose model it exports."""
    return job.export.objective or job.train.objectives[-1].type


def _statistics(run: Run, rows: Rows) -> dict[str, Any]:
    """Per attribute: its number of levels and every statistic with its interval."""
    weights_BP = draws(rows.num_prompts, run.job.evaluate.bootstrap, run.job.seed)
    return {
        a.name: {"levels": a.levels} | {k: interval(s.of(rows, i, weights_BP)).as_json() for k, s in STATISTICS.items()}
        for i, a in enumerate(run.job.control.attributes)
    }


def _add_differences(run: Run, base: Run, found: dict[str, Any]) -> None:
    """Put `difference` beside each statistic of an attribute that the base has too; None where it would mean nothing."""
    levels, theirs = ({a.name: a.levels for a in r.job.control.attributes} for r in (run, base))
    grids = (_grid(run), _grid(base))
    shared = sorted(set(grids[0].prompts) & set(grids[1].prompts))
    rows = [among(g, shared) for g in grids]
    for name, values in found.items():
        values["shared_prompts"] = len(shared)
        for key, s in STATISTICS.items():
            known = bool(shared) and name in theirs and not (s.per_levels and levels[name] != theirs[name])
            axes = (list(levels).index(name), list(theirs).index(name)) if known else None
            settings = (base.job.evaluate.bootstrap, base.job.seed)
            values[key]["difference"] = difference(s, rows, axes, *settings) if axes else None


def difference(
    statistic: Statistic, rows: Sequence[Rows], axes: Sequence[int], num_bootstrap: int, seed: int
) -> dict[str, float | None]:
    """A statistic of the first rows minus that of the second on the same resamples of their prompts, and `p` where it has one."""
    weights_BP = draws(rows[0].num_prompts, num_bootstrap, seed)
    first, second = (statistic.of(r, axis, weights_BP) for r, axis in zip(rows, axes, strict=True))
    made = interval(first - second).as_json()
    if statistic.sums is None:
        return made
    mine, theirs = (statistic.sums(r, axis) for r, axis in zip(rows, axes, strict=True))
    return made | {"p": permutation_p(mine, theirs, seed)}


def _correct(variants: Sequence[Mapping[str, Any]]) -> None:
    """Put `p_holm` beside each `p`."""
    for key in STATISTICS:
        all_values = (values[key]["difference"] for attributes in variants for values in attributes.values())
        family = [d for d in all_values if d is not None and "p" in d]
        for value, adjusted in zip(family, holm([d["p"] for d in family]), strict=True):
            value["p_holm"] = adjusted


def among(rows: grid_rows.Rows, prompts: Sequence[str]) -> Rows:
    """The rows of some prompts, which are numbered as they are given."""
    number_P = np.full(rows.num_prompts, -1)
    number_P[rows.numbers_of(prompts)] = np.arange(len(prompts))
    prompt_N = number_P[rows.prompt_N]
    kept = prompt_N >= 0
    return Rows(rows.requested_NA[kept], rows.units_NA[kept], prompt_N[kept], len(prompts))


def _grid(run: Run) -> grid_rows.Rows:
    """What the exported method answered."""
    table = run.out("evaluate").read_table("grid", schema.grid([a.name for a in run.job.control.attributes]))
    return grid_rows.rows_of(table, run.job.control)[exported(run.job)]
