"""The run's report: what its one HTML page shows.

`render` turns plain data into the page; it reads no tables and writes no files. A panel without data is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctrlray.stages import report_checks as checks
from ctrlray.stages import report_cost as cost
from ctrlray.stages import report_dial as dial
from ctrlray.stages import report_figures as figures
from ctrlray.stages import report_methods as methods
from ctrlray.stages import report_tables as tables
from ctrlray.stages import report_trades as trades
from ctrlray.stages import report_training as training
from ctrlray.stages.report_alarms import alarms_of
from ctrlray.stages.report_page import make_page
from ctrlray.stages.report_verdict import is_baseline, verdict

TEMPLATE = "report.html.j2"
OPEN_PROMPTS = 2


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows, as JSON-like values; what a run did not produce stays empty."""

    job_name: str
    job_yaml: str
    """The resolved job."""
    model: Mapping[str, Any]
    """name, fingerprint, parameters."""
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    started: str
    run_root: str
    attributes: Sequence[Mapping[str, Any]]
    """`[{"name": "helpfulness", "levels": 3}, ...]` in the control space's order."""
    ledger: Sequence[Mapping[str, Any]] = ()
    """One per stage: stage, rows_in, rows_out, dropped {reason: n}, quarantined {error: n}, seconds, tokens, status."""
    cells_before: Mapping[str, int] = field(default_factory=dict)
    """`{"3,1": 12}`: rows per level cell before distillation."""
    cells_after: Mapping[str, int] = field(default_factory=dict)
    strategy: str = ""
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Per method: points with step and any of the keys of `report_training.CURVES`."""
    passes: Mapping[str, str] = field(default_factory=dict)
    """In words, how each method's training shared prompts."""
    code_gaps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per method: value, low, high, num_examples; NLL under wrong codes minus under the right one, nats per token."""
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per method, as `ctrlray.metrics.grid` makes them."""
    spent: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Per method: tokens and engine seconds that one answer takes."""
    comparisons: Sequence[Mapping[str, Any]] = ()
    """Paired tests, as `ctrlray.metrics.compare` makes them."""
    judge: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`metrics` again, under held-out judges."""
    judge_comparisons: Sequence[Mapping[str, Any]] = ()
    """`comparisons` again, under held-out judges."""
    correlation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per attribute: overall, within_prompt and num_answers of the judge against the training reward."""
    hacking: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per method: points [{step, reward, judge, kl, length}], rule, alarm, changes."""
    refusals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per prompt set: attribute, methods {method: {level: {label: {value, low, high, num_answers}}}}."""
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per further prompt set: metrics and judge, each as above."""
    costs: Mapping[str, Any] = field(default_factory=dict)
    """As `ctrlray.cost.cost` makes them."""
    projections: Sequence[Mapping[str, Any]] = ()
    """As `ctrlray.cost.project` makes them."""
    pool_slopes: Sequence[Sequence[Any]] | None = None
    samples: Sequence[Mapping[str, Any]] = ()
    """prompt, method, cells [{levels, text, units, finish_reason, judge: units or None}]."""
    alarms: Sequence[Mapping[str, Any]] = ()
    """name, severity (info, warning, error), detail; advice is looked up by name unless given."""
    reward_card: Mapping[str, Any] | None = None


def render(data: ReportData) -> str:
    """The page as text."""
    return make_page(TEMPLATE, **_context(data))


def _context(data: ReportData) -> dict[str, Any]:
    names = [str(a["name"]) for a in data.attributes]
    levels = [int(a["levels"]) for a in data.attributes]
    look = figures.styles(_every_method(data))
    return {
        "data": data,
        "names": names,
        "look": look,
        "verdict": verdict(names, data.metrics, data.code_gaps, data.judge),
        "alarms": alarms_of(data.alarms, data.ledger, data.hacking),
        "ledger": tables.ledger_table(data.ledger) if data.ledger else None,
        "unbalanced": [str(s.get("stage")) for s in data.ledger if tables.unaccounted(s)],
        "total_seconds": tables.total_seconds(data.ledger),
        "cells": _cells(names, levels, data),
        "curves": [
            *training.curve_figures(data.curves, look),
            *training.achieved_figures(names, data.curves),
            *training.phase_figures(data.curves),
        ],
        "responses": dial.response_figures(names, levels, data.metrics, look),
        "level_tables": [trades.level_table(n, data.metrics) for n in names] if data.metrics else [],
        "heats": dial.heat_figures(names, levels, data.metrics),
        "pareto": dial.pareto_figures(names, data.metrics, look),
        "trade": trades.trade_table(names, data.metrics),
        **_compared(names, data),
        "slopes": _slopes(names, data),
        "entanglement": trades.entanglement_table(data.metrics, data.pool_slopes),
        **_checked(names, data, look),
        **_spent(data),
        "samples": _samples(data.samples),
        "sampled": list(dict.fromkeys(str(s["method"]) for s in data.samples)),
        "levels": levels,
        "reward": tables.pairs_table("Reward model", data.reward_card) if data.reward_card else None,
        "versions": tables.pairs_table("Versions", data.versions),
        "machine": tables.pairs_table("Machine", data.machine),
    }


def _every_method(data: ReportData) -> list[str]:
    sampled = [str(s["method"]) for s in data.samples]
    refusing = [m for found in data.refusals.values() for m in found["methods"]]
    in_sets = [m for found in data.sets.values() for m in found["metrics"]]
    compared = [c[side] for c in data.comparisons for side in ("first", "second")]
    return [*data.metrics, *data.curves, *data.code_gaps, *sampled, *refusing, *in_sets, *compared, *data.hacking]


def _compared(names: Sequence[str], data: ReportData) -> dict[str, Any]:
    own, judged = data.comparisons, data.judge_comparisons
    tables_of = [methods.metric_table(n, data.metrics, data.judge, own, judged) for n in names]
    held = [methods.length_table(n, data.metrics, data.judge) for n in names]
    tests = (("the training reward", own), ("the judge", judged))
    return {
        "overview": methods.overview_table(data.metrics, data.code_gaps, data.spent) if data.metrics or data.code_gaps else None,
        "metric_tables": [t for t in tables_of if t],
        "length_tables": [t for t in held if t],
        "comparisons": [methods.comparison_table(found, regime) for regime, found in tests if found],
        "texts": methods.text_table(data.metrics),
        "correlation": methods.correlation_table(data.correlation) if data.correlation else None,
    }


def _checked(names: Sequence[str], data: ReportData, look: Mapping[str, figures.Style]) -> dict[str, Any]:
    sets = data.sets.items()
    return {
        "set_tables": [methods.set_table(name, names, found["metrics"], found.get("judge") or {}) for name, found in sets],
        "hacking": checks.hacking_figures(data.hacking),
        "hacking_table": checks.hacking_table(data.hacking),
        "parted": [m for m, course in data.hacking.items() if course.get("alarm")],
        "refusals": checks.refusal_figures(data.refusals, look),
        "refusal_tables": checks.refusal_tables(data.refusals),
        "refusing": list(dict.fromkeys(m for found in data.refusals.values() for m in found["methods"])),
    }


def _spent(data: ReportData) -> dict[str, Any]:
    known = bool(data.costs)
    return {
        "cost_figures": cost.cost_figures(data.costs) if known else [],
        "cost": cost.cost_table(data.costs) if known else None,
        "projections": cost.projection_table(data.costs, data.projections) if known and data.projections else None,
        "assumptions": list(data.projections[0]["assumptions"]) if data.projections else [],
    }


def _cells(names: Sequence[str], levels: Sequence[int], data: ReportData) -> dict[str, Any] | None:
    """Figures and numbers of the level cells, and how many of all cells are empty."""
    before, after = data.cells_before, data.cells_after
    if not before and not after:
        return None
    total = math.prod(levels)
    return {
        "figures": figures.cell_figures(names, levels, before, after),
        "table": tables.cells_table(names, before, after),
        "total": total,
        "empty_before": total - sum(n > 0 for n in before.values()) if before else None,
        "empty_after": total - sum(n > 0 for n in after.values()) if after else None,
    }


def _slopes(names: Sequence[str], data: ReportData) -> dict[str, Any] | None:
    """Heat maps where there is something off the diagonal, numbers always."""
    plain = {m: r["slopes"] for m, r in data.metrics.items() if r.get("slopes")}
    adjusted = {m: r["slopes_length_adjusted"] for m, r in data.metrics.items() if r.get("slopes_length_adjusted")}
    pool = {"data pool": data.pool_slopes} if data.pool_slopes else {}
    shown = {**pool, **plain}
    if not shown:
        return None
    if len(names) == 1:
        return {"figures": [], "tables": [trades.single_slope_table(names[0], shown, adjusted)]}
    return {
        "figures": [dial.slope_figure(m, names, s) for m, s in shown.items()],
        "tables": [
            *(trades.slope_table(m, names, s) for m, s in shown.items()),
            *(trades.slope_table(m, names, s, length=True) for m, s in adjusted.items()),
        ],
    }


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sample answers by prompt, then method; the first prompts' trained methods are unfolded.

    The starting model is free: its one answer was given to no setting.
    """
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        cells = sorted(sample["cells"], key=lambda c: tuple(c["levels"]))
        columns = len({tuple(c["levels"])[-1] for c in cells}) if cells else 1
        method = str(sample["method"])
        entry = {"method": method, "cells": cells, "columns": min(columns, 5), "free": method == "start"}
        by_prompt.setdefault(str(sample["prompt"]), []).append(entry)
    return [
        {
            "prompt": prompt,
            "methods": [{**e, "open": i < OPEN_PROMPTS and not is_baseline(e["method"])} for e in entries],
        }
        for i, (prompt, entries) in enumerate(by_prompt.items())
    ]
