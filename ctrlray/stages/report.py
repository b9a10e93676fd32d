"""The run's report: one HTML page that needs nothing but a browser, and opens no connection.

`render` turns plain data into the page; it reads no tables and writes no files. Prompts and answers are untrusted text:
the template escapes everything, and the page's content policy runs no script but the two that are hashed here.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ctrlray.stages import report_figures as figures
from ctrlray.stages import report_tables as tables
from ctrlray.stages.report_verdict import alarms_of, is_baseline, verdict

TEMPLATE = "report.html.j2"
SCRIPT = "report.js"
OPEN_PROMPTS = 2
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "


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
    passes: Mapping[str, str] = field(default_factory=dict)
    """In words, how each method's training shared prompts."""
    """Per method: points with step and any of the keys of `report_figures.CURVES`."""
    code_gaps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per method: value, low, high, num_examples; NLL under wrong codes minus under the right one, nats per token."""
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per method, as `ctrlray.metrics.grid` makes them."""
    pool_slopes: Sequence[Sequence[Any]] | None = None
    samples: Sequence[Mapping[str, Any]] = ()
    """prompt, method, cells [{levels, text, units, finish_reason}]."""
    alarms: Sequence[Mapping[str, Any]] = ()
    """name, severity (info, warning, error), detail; advice is looked up by name unless given."""
    reward_card: Mapping[str, Any] | None = None


def render(data: ReportData) -> str:
    """The page as text that UTF-8 can always hold."""
    page = _environment().get_template(TEMPLATE).render(_context(data))
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    # autoescape is unconditional: the default rule goes by file ending and would miss `.j2`
    environment = Environment(
        loader=PackageLoader("ctrlray", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=tables.number, percent=tables.percent, duration=tables.duration)
    return environment


def _context(data: ReportData) -> dict[str, Any]:
    names = [str(a["name"]) for a in data.attributes]
    levels = [int(a["levels"]) for a in data.attributes]
    sampled = [str(s["method"]) for s in data.samples]
    look = figures.styles([*data.metrics, *data.curves, *data.code_gaps, *sampled])
    plotly_js, page_js = Markup(get_plotlyjs()), Markup(_script())
    return {
        "data": data,
        "names": names,
        "look": look,
        "plotly_js": plotly_js,
        "page_js": page_js,
        "policy": POLICY + " ".join(map(_hash, (plotly_js, page_js))),
        "verdict": verdict(names, data.metrics, data.code_gaps),
        "alarms": alarms_of(data.alarms, data.ledger),
        "ledger": tables.ledger_table(data.ledger) if data.ledger else None,
        "unbalanced": [str(s.get("stage")) for s in data.ledger if tables.unaccounted(s)],
        "total_seconds": tables.total_seconds(data.ledger),
        "cells": _cells(names, levels, data),
        "curves": [
            *figures.curve_figures(data.curves, look),
            *figures.achieved_figures(names, data.curves),
            *figures.phase_figures(data.curves),
        ],
        "overview": tables.overview_table(data.metrics, data.code_gaps) if data.metrics or data.code_gaps else None,
        "responses": figures.response_figures(names, levels, data.metrics, look),
        "level_tables": [tables.level_table(n, data.metrics) for n in names] if data.metrics else [],
        "metric_tables": [t for n in names if (t := tables.metric_table(n, data.metrics))],
        "slopes": _slopes(names, data),
        "samples": _samples(data.samples),
        "reward": tables.pairs_table("Reward model", data.reward_card) if data.reward_card else None,
        "versions": tables.pairs_table("Versions", data.versions),
        "machine": tables.pairs_table("Machine", data.machine),
    }


def _script() -> str:
    return (resources.files("ctrlray") / "assets" / SCRIPT).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _cells(names: Sequence[str], levels: Sequence[int], data: ReportData) -> dict[str, Any]:
    """Figures and numbers of the level cells, and how many of all cells are empty."""
    total = 1
    for n in levels:
        total *= n
    before, after = data.cells_before, data.cells_after
    known = bool(before or after)
    return {
        "figures": figures.cell_figures(names, levels, before, after),
        "table": tables.cells_table(names, before, after) if known else None,
        "total": total,
        "empty_before": total - sum(n > 0 for n in before.values()) if before else None,
        "empty_after": total - sum(n > 0 for n in after.values()) if after else None,
    }


def _slopes(names: Sequence[str], data: ReportData) -> dict[str, Any]:
    """Heat maps where there is something off the diagonal, numbers always."""
    plain = {m: r["slopes"] for m, r in data.metrics.items() if r.get("slopes")}
    adjusted = {m: r["slopes_length_adjusted"] for m, r in data.metrics.items() if r.get("slopes_length_adjusted")}
    pool = {"data pool": data.pool_slopes} if data.pool_slopes else {}
    shown = {**pool, **plain}
    if len(names) == 1:
        return {"figures": [], "tables": [tables.single_slope_table(names[0], shown, adjusted)] if shown else []}
    return {
        "figures": [figures.slope_figure(m, names, s) for m, s in shown.items()],
        "tables": [
            *(tables.slope_table(m, names, s) for m, s in shown.items()),
            *(tables.slope_table(m, names, s, length=True) for m, s in adjusted.items()),
        ],
    }


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sample answers by prompt, then method; the first prompts' trained methods are unfolded."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        cells = sorted(sample["cells"], key=lambda c: tuple(c["levels"]))
        columns = len({tuple(c["levels"])[-1] for c in cells}) if cells else 1
        entry = {"method": str(sample["method"]), "cells": cells, "columns": min(columns, 5)}
        by_prompt.setdefault(str(sample["prompt"]), []).append(entry)
    return [
        {
            "prompt": prompt,
            "methods": [{**e, "open": i < OPEN_PROMPTS and not is_baseline(e["method"])} for e in entries],
        }
        for i, (prompt, entries) in enumerate(by_prompt.items())
    ]
