"""What a reader should check before believing a dial: reward hacking, and refusals along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from ctrlray.stages.report_figures import Figure, Rows, Style, axis, curve, plot
from ctrlray.stages.report_numbers import interval, is_number, number, percent, point
from ctrlray.stages.report_tables import Cell, Table, metric_cell, number_cell, percent_cell, table

TRAINED, JUDGED = Style("#2f7fc1", "circle", ""), Style("#d55e00", "square", "")
LABELS = {"safe": "safe prompts that look unsafe", "unsafe": "prompts to be refused"}
Rates = dict[int, tuple[float, float, float]]
"""Refusal rate and its interval by level."""
_BESIDE = {"kl": ("KL to the model it started from", "nats per response"), "length": ("Length of answers", "tokens")}


def hacking_figures(hacking: Mapping[str, Any]) -> list[Figure]:
    """Per method: the training reward and the judge's of the same answers along the steps, and KL and length below."""
    figures = []
    for method, course in hacking.items():
        points = course["points"]
        both = [(n, s, _known(points, k)) for n, k, s in (("training reward", "reward", TRAINED), ("judge", "judge", JUDGED))]
        traces = [curve(name, kept, style) for name, style, kept in both if kept]
        if traces:
            words = "; ".join(f"{name} from {number(kept[0][1])} to {number(kept[-1][1])}" for name, _, kept in both if kept)
            title = f"{method}: training reward and judge"
            more: dict[str, Any] = {"xaxis": axis("step"), "yaxis": axis("level units"), "legend": _LEGEND}
            drawn: Rows = [["step", "training reward", "judge", "rollouts"]]
            drawn += [[p["step"], p.get("reward"), p.get("judge"), p.get("rollouts")] for p in points]
            alt = f"{title} by step: {words}."
            figures.append(plot(title, alt, traces, 300, note=_note(course), rows=drawn, showlegend=True, **more))
        for key, (title, unit) in _BESIDE.items():
            if kept := _known(points, key):
                alt = f"{title} of {method} by step, from {number(kept[0][1])} to {number(kept[-1][1])} {unit}."
                more = {"xaxis": axis("step"), "yaxis": axis(unit)}
                named = f"{method}: {title}"
                traces = [curve(method, kept, TRAINED)]
                figures.append(plot(named, alt, traces, 300, note=unit, rows=[["step", unit], *map(list, kept)], **more))
    return figures


_LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def _note(course: Mapping[str, Any]) -> str:
    return "they part: the reward rises while the judge falls" if course.get("alarm") else "of the same answers; they do not part"


def _known(points: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(p["step"], p[key]) for p in points if is_number(p.get(key))]


def hacking_table(hacking: Mapping[str, Any]) -> Table | None:
    """The changes that the alarm goes by."""
    rows = [
        [
            Cell(method),
            Cell("steps {} to {}".format(*change["from"])),
            Cell("steps {} to {}".format(*change["to"])),
            metric_cell(change["reward"], 0.0),
            metric_cell(change["judge"], 0.0),
        ]
        for method, course in hacking.items()
        for change in course.get("changes") or ()
    ]
    header = ("Method", "From", "To", "Training reward", "Judge")
    return table("Change of the mean rewards, in level units", header, rows) if rows else None


def refusal_figures(refusals: Mapping[str, Any], look: Mapping[str, Style]) -> list[Figure]:
    """Per prompt set and label: how often each method refuses at each requested level."""
    figures = []
    for name, found in refusals.items():
        labels = {label for rates in found["methods"].values() for by_label in rates.values() for label in by_label}
        for label in sorted(labels):
            curves = {m: _rates(rates, label) for m, rates in found["methods"].items()}
            figures.append(_refusals(name, label, found["attribute"], {m: c for m, c in curves.items() if c}, look))
    return figures


def _rates(rates: Mapping[str, Any], label: str) -> Rates:
    """Level -> rate with its interval (without width where it has none)."""
    found: Rates = {}
    for level, by_label in rates.items():
        value = point(by_label.get(label))
        if value is not None:
            found[int(level)] = interval(by_label[label]) or (value, value, value)
    return dict(sorted(found.items()))


def _refusals(name: str, label: str, attribute: str, curves: Mapping[str, Rates], look: Mapping[str, Style]) -> Figure:
    traces = []
    for i, (method, rates) in enumerate(curves.items()):
        shift, style = 0.05 * (i - (len(curves) - 1) / 2), look[method]
        above, below = [100 * (h - v) for v, _, h in rates.values()], [100 * (v - low) for v, low, _ in rates.values()]
        traces.append(
            go.Scatter(
                x=[level + shift for level in rates],
                y=[100 * v for v, _, _ in rates.values()],
                error_y={"type": "data", "array": above, "arrayminus": below, "color": style.color, "thickness": 1.4, "width": 3},
                name=escape(method),
                mode="lines+markers",
                line={"color": style.color, "width": 2},
                marker={"color": style.color, "symbol": style.symbol, "size": 9},
                customdata=list(rates),
                hovertemplate=f"{escape(method)}, {escape(attribute)} %{{customdata}}: %{{y:.0f}}% refused<extra></extra>",
            )
        )
    words = (f"{m}: {', '.join(f'{k} {percent(v[0])}' for k, v in rates.items())}" for m, rates in curves.items())
    worded = LABELS.get(label, f"{label} prompts")
    alt = f"Share of refusals by requested {attribute} on {worded} of {name}. {'; '.join(words)}."
    ticks = sorted({level for rates in curves.values() for level in rates})
    xaxis = {**axis(f"requested {attribute}"), "tickvals": ticks, "range": [min(ticks) - 0.3, max(ticks) + 0.3]}
    yaxis = {**axis("% of answers that refuse"), "range": [-3, 103]}
    drawn: Rows = [["method", f"requested {attribute}", "share refused", "low", "high"]]
    drawn += [[m, level, *rate] for m, rates in curves.items() for level, rate in rates.items()]
    return plot(f"{name}: {label}", alt, traces, 320, note=worded, rows=drawn, xaxis=xaxis, yaxis=yaxis)


def refusal_tables(refusals: Mapping[str, Any]) -> list[Table]:
    """The same as numbers, with how many answers they rest on."""
    tables = []
    for name, found in refusals.items():
        keys = sorted({(label, int(k)) for rates in found["methods"].values() for k, by in rates.items() for label in by})
        header = ("Method", *(f"{label}, {found['attribute']} {level}" for label, level in keys))
        rows = [
            [Cell(m, method=m), *(_rate_cell((rates.get(str(level)) or {}).get(label)) for label, level in keys)]
            for m, rates in found["methods"].items()
        ]
        tables.append(table(f"{name}: share of answers that refuse, by a list of phrases", header, rows))
    return tables


def _rate_cell(value: Any) -> Cell:
    return percent_cell(value, note=f"of {number(value.get('num_answers'))}") if value else number_cell(None)
