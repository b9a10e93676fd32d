"""What the run cost: `ctrlray.cost`'s values as a chart and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from ctrlray.stages.report_figures import AFTER, BEFORE, Figure, Rows, axis, plot
from ctrlray.stages.report_numbers import duration, number, percent
from ctrlray.stages.report_tables import Cell, Table, duration_cell, number_cell, table


def cost_figures(costs: Mapping[str, Any]) -> list[Figure]:
    """Seconds and device-seconds by stage, start-up apart from work."""
    stages = [s for s in costs["stages"] if not s.get("streamed_behind")]
    figures = []
    if stages:
        start = [s["start_s"] or 0.0 for s in stages]
        work = [s["seconds"] - up for s, up in zip(stages, start, strict=True)]
        traces = [_bars("work", stages, work, AFTER), _bars("start-up", stages, start, BEFORE)]
        figures.append(_figure("Seconds by stage", stages, traces, "blue work, grey start-up", "seconds"))
    held = [s for s in costs["stages"] if s["device_seconds"]]
    if held:
        traces = [_bars("device-seconds", held, [s["device_seconds"] for s in held], AFTER)]
        figures.append(_figure("Device-seconds by stage", held, traces, "devices times how long they were held", "seconds"))
    return figures


def _bars(name: str, stages: Sequence[Mapping[str, Any]], values: Sequence[float], color: str) -> Any:
    hover = f"%{{y}}, {name}: %{{x:,.1f}} s<extra></extra>"
    names = [escape(str(s["stage"])) for s in stages]
    return go.Bar(x=list(values), y=names, name=name, orientation="h", marker={"color": color}, hovertemplate=hover)


def _figure(title: str, stages: Sequence[Mapping[str, Any]], traces: Sequence[Any], note: str, unit: str) -> Figure:
    sums = [sum(values) for values in zip(*(t.x for t in traces), strict=True)]
    words = ", ".join(f"{s['stage']} {duration(float(total))}" for s, total in zip(stages, sums, strict=True))
    axes = {"xaxis": axis(unit), "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False}}
    drawn: Rows = [["stage", *(str(t.name) for t in traces)]]
    drawn += zip((s["stage"] for s in stages), *(t.x for t in traces), strict=True)
    return plot(title, f"{title}: {words}.", traces, 90 + 30 * len(stages), note=note, rows=drawn, barmode="stack", **axes)


def cost_table(costs: Mapping[str, Any]) -> Table:
    """Rows, tokens, seconds and device-seconds by stage; `costs` may be a projection's."""
    total = costs["total"]
    rows = [_row(s, total["seconds"]) for s in costs["stages"]]
    held = ", ".join(f"{number(total[f'{d}_seconds'], 0)} {d.upper()}-s" for d in ("gpu", "cpu") if total[f"{d}_seconds"])
    rows.append(
        [
            Cell("total"),
            number_cell(total["rows"], note="sampled answers"),
            number_cell(total["tokens"]),
            Cell(""),
            duration_cell(total["seconds"]),
            duration_cell(total["start_s"], note=f"{percent(costs['overhead_share'])} of all seconds at least"),
            Cell(""),
            Cell(held),
            Cell(""),
        ]
    )
    header = ("Stage", "Rows", "Tokens", "Tokens/s", "Time", "Start-up", "Devices", "Device-seconds", "Share of time")
    return table("Cost by stage", header, rows)


def _row(stage: Mapping[str, Any], total: float) -> list[Cell]:
    share = stage["seconds"] / total if total else None
    host = stage.get("streamed_behind")
    return [
        Cell(str(stage["stage"]), note=f"streamed with {host}" if host else ""),
        number_cell(stage["rows"]),
        number_cell(stage["tokens"]),
        number_cell(stage["tokens_per_s"], 1),
        duration_cell(stage["seconds"]),
        duration_cell(stage["start_s"]),
        Cell(f"{stage['devices']:g} {stage['device']}"),
        number_cell(float(stage["device_seconds"]), 0),
        Cell(percent(share), bar=share, value=share),
    ]


def projection_table(costs: Mapping[str, Any], projections: Sequence[Mapping[str, Any]]) -> Table:
    """The run beside what it would take at other sizes: time and device-seconds by stage."""
    header = ("Stage", "This run", *(_size(p) for p in projections))
    sizes = (costs, *projections)
    by_stage = [{s["stage"]: _spent(s["seconds"], s["device_seconds"]) for s in size["stages"]} for size in sizes]
    rows = [[Cell(stage), *(found[stage] for found in by_stage)] for stage in by_stage[0]]
    totals = (_spent(t["seconds"], t["gpu_seconds"] + t["cpu_seconds"]) for t in (size["total"] for size in sizes))
    return table("Time, and device-seconds in small print", header, [*rows, [Cell("total"), *totals]])


def _size(projection: Mapping[str, Any]) -> str:
    fast = f", devices {projection['speedup']:g} times as fast" if projection["speedup"] != 1 else ""
    return f"{parameters(projection['parameters'])} parameters, {number(projection['rows'])} answers{fast}"


def parameters(count: float) -> str:
    """`7e9` becomes `7.0 billion`."""
    return f"{count / 1e9:,.1f} billion" if count >= 1e9 else f"{count / 1e6:,.0f} million"


def _spent(seconds: float, device_seconds: float) -> Cell:
    return duration_cell(seconds, note=f"{number(float(device_seconds), 0)} device-s")
