"""Figures of the evaluated dial: requested against achieved, every cell, trade-offs and entanglement."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ctrlray.metrics.pareto import front
from ctrlray.stages.report_figures import DIVERGING, Figure, Rows, Style, category, heat, plot
from ctrlray.stages.report_numbers import bounds, ends, interval, number, point
from ctrlray.stages.report_trades import level_means
from ctrlray.stages.report_verdict import is_baseline

MAX_HEAT_ROWS = 30
REFERENCE = 0.5
"""Reference point of the hypervolume in level units: the lowest that any answer can score."""


def response_figures(
    attributes: Sequence[str], levels: Sequence[int], metrics: Mapping[str, Any], look: Mapping[str, Style]
) -> list[Figure]:
    """Requested against achieved: per attribute one plot of every method with 95% intervals, and the ideal diagonal."""
    return [f for a, n in zip(attributes, levels, strict=True) if (f := _response(a, n, metrics, look)) is not None]


def _response(attribute: str, levels: int, metrics: Mapping[str, Any], look: Mapping[str, Style]) -> Figure | None:
    shown = {m: means for m, r in metrics.items() if (means := _points(r, attribute))}
    if not shown:
        return None
    ideal = go.Scatter(
        x=[1, levels],
        y=[1, levels],
        mode="lines",
        name="ideal",
        line={"dash": "dot", "width": 2, "color": "#909090"},
        hovertemplate="ideal<extra></extra>",
    )
    traces = [ideal]
    for i, (method, means) in enumerate(shown.items()):
        shift = 0.06 * (i - (len(shown) - 1) / 2)
        traces.append(_response_line(method, means, shift, look[method]))
    words = (f"{m}: {', '.join(f'{k} gives {number(v[0])}' for k, v in means.items())}" for m, means in shown.items())
    alt = f"Mean achieved {attribute} per requested level, in level units. {'; '.join(words)}."
    edge = [p for means in shown.values() for v in means.values() for p in v]
    low, high = min([1.0, *edge]), max([float(levels), *edge])
    xaxis = {
        "title": {"text": f"requested {attribute}"},
        "tickvals": list(range(1, levels + 1)),
        "range": [0.7, levels + 0.3],
    }
    yaxis = {"title": {"text": "achieved, level units"}, "range": [low - 0.2, high + 0.2], "dtick": 1}
    drawn: Rows = [["method", f"requested {attribute}", "achieved", "low", "high"]]
    drawn += [[m, level, *found] for m, means in shown.items() for level, found in means.items()]
    return plot(attribute, alt, traces, 340, rows=drawn, xaxis=xaxis, yaxis=yaxis)


def _points(result: Mapping[str, Any], attribute: str) -> dict[int, tuple[float, float, float]]:
    means = level_means(result, attribute)
    found: dict[int, tuple[float, float, float]] = {}
    for level in sorted(means):
        value = point(means[level])
        if value is not None:
            found[level] = interval(means[level]) or (value, value, value)
    return found


def _response_line(method: str, means: Mapping[int, tuple[float, float, float]], shift: float, style: Style) -> Any:
    values = list(means.values())
    error = {
        "type": "data",
        "array": [high - value for value, _, high in values],
        "arrayminus": [value - low for value, low, _ in values],
        "color": style.color,
        "thickness": 1.6,
        "width": 4,
    }
    return go.Scatter(
        x=[level + shift for level in means],
        y=[v[0] for v in values],
        error_y=error,
        name=escape(method),
        mode="lines+markers",
        line={"color": style.color, "width": 2},
        marker={"color": style.color, "symbol": style.symbol, "size": 10},
        customdata=[[level, low, high] for level, (_, low, high) in means.items()],
        hovertemplate=f"{escape(method)}, requested %{{customdata[0]}}: %{{y:.2f}} "
        "[%{customdata[1]:.2f}, %{customdata[2]:.2f}]<extra></extra>",
    )


def slope_figure(name: str, attributes: Sequence[str], slopes: Sequence[Sequence[Any]]) -> Figure:
    """A slope matrix: how many levels each achieved score moves per requested level."""
    values = [[point(v) for v in row] for row in slopes]
    texts = [["<br>".join(filter(None, (number(point(v)), bounds(v)))) for v in row] for row in slopes]
    names = [escape(a) for a in attributes]
    worded = (
        f"{a}: {', '.join(f'{b} {number(v)}' for b, v in zip(attributes, row, strict=False))}"
        for a, row in zip(attributes, values, strict=False)
    )
    trace = heat(names, names, values, texts, DIVERGING, zmin=-1, zmax=1)
    trace.hovertemplate = "requested %{y}, achieved %{x}: %{z:.3f}<extra></extra>"
    alt = f"Slope matrix of {name}, achieved levels per requested level. Requested {'; requested '.join(worded)}."
    xaxis = category("achieved")
    yaxis = category("requested", autorange="reversed", tickangle=-90 if len(names) < 4 else 0)
    drawn: Rows = [["requested", "achieved", "slope", "low", "high"]]
    drawn += [[a, b, *ends(v)] for a, row in zip(attributes, slopes, strict=False) for b, v in zip(attributes, row, strict=False)]
    return plot(name, alt, [trace], 110 + 84 * len(names), rows=drawn, xaxis=xaxis, yaxis=yaxis)


def heat_figures(attributes: Sequence[str], levels: Sequence[int], metrics: Mapping[str, Any]) -> list[Figure]:
    """Every cell of the grid: per attribute and method the mean achieved units at each setting, with the number of answers.

    Rows are settings of all attributes but the last, columns those of the last; none with one attribute, or too many rows.
    """
    if len(attributes) < 2:
        return []
    figures = []
    for (attribute, top), (method, result) in itertools.product(zip(attributes, levels, strict=True), metrics.items()):
        cells = {tuple(c["levels"]): c for c in result.get("cells") or ()}
        rows, columns = sorted({k[:-1] for k in cells}), sorted({k[-1] for k in cells})
        if cells and len(rows) <= MAX_HEAT_ROWS:
            figures.append(_dial_heat(method, attribute, top, attributes, rows, columns, cells))
    return figures


def _dial_heat(
    method: str,
    attribute: str,
    top: int,
    attributes: Sequence[str],
    rows: Sequence[tuple[int, ...]],
    columns: Sequence[int],
    cells: Mapping[tuple[int, ...], Mapping[str, Any]],
) -> Figure:
    found = [[cells.get((*r, c)) for c in columns] for r in rows]
    values = [[point(cell["units"][attribute]) if cell else None for cell in row] for row in found]
    texts = [[_cell_text(cell, attribute) for cell in row] for row in found]
    named = [", ".join(map(str, r)) for r in rows]
    trace = heat([str(c) for c in columns], named, values, texts, DIVERGING, zmin=REFERENCE, zmax=top + REFERENCE)
    asked = ", ".join(attributes[:-1])
    trace.hovertemplate = f"{escape(asked)} %{{y}}, {escape(attributes[-1])} %{{x}}: %{{z:.2f}}<extra></extra>"
    worded = (f"{asked} {r}: {', '.join(map(number, row))}" for r, row in zip(named, values, strict=True))
    what = f"Heat map, mean achieved {attribute} of {method} by setting"
    alt = f"{what}; {attributes[-1]} rises to the right. {'; '.join(worded)}."
    axes: dict[str, Any] = {"xaxis": category(f"requested {attributes[-1]}"), "yaxis": category(f"requested {asked}")}
    drawn: Rows = [[*(f"requested {a}" for a in attributes), f"achieved {attribute}", "low", "high", "answers"]]
    drawn += [[*levels, *ends(cell["units"][attribute]), cell["count"]] for levels, cell in sorted(cells.items())]
    return plot(f"{attribute}: {method}", alt, [trace], 96 + 48 * max(3, len(rows)), rows=drawn, **axes)


def _cell_text(cell: Mapping[str, Any] | None, attribute: str) -> str:
    return f"{number(point(cell['units'][attribute]))}<br>n {cell['count']}" if cell else "none"


def pareto_figures(attributes: Sequence[str], metrics: Mapping[str, Any], look: Mapping[str, Style]) -> list[Figure]:
    """Per pair of attributes: what each setting of each method reaches on average, and the front of each method."""
    pairs = itertools.combinations(attributes, 2)
    return [f for first, second in pairs if (f := _pareto(first, second, metrics, look)) is not None]


def _pareto(first: str, second: str, metrics: Mapping[str, Any], look: Mapping[str, Style]) -> Figure | None:
    traces, words, edges = [], [], []
    drawn: Rows = [["method", "levels requested", f"achieved {first}", f"achieved {second}", "on the front"]]
    for method, result in metrics.items():
        named = [(_setting(c), point(c["units"][first]), point(c["units"][second])) for c in result.get("cells") or ()]
        known = [(name, x, y) for name, x, y in named if x is not None and y is not None]
        if not known:
            continue
        points = np.array([[x, y] for _, x, y in known])
        on = front(points)
        traces += _front_traces(method, [name for name, _, _ in known], points, on, look[method])
        edges.append(points)
        drawn += [[method, *one, "yes" if here else "no"] for one, here in zip(known, on, strict=True)]
        volume = (result.get("pareto") or {}).get("hypervolume")
        best = " and ".join(f"{number(float(x))}, {number(float(y))}" for x, y in points[on])
        words.append(f"{method} (hypervolume {number(point(volume))}) has its front at {best}")
    if not traces:
        return None
    low, high = np.concatenate(edges).min(axis=0), np.concatenate(edges).max(axis=0)
    pad = np.maximum(0.12 * (high - low), 0.05)
    axes: dict[str, Any] = {
        f"{name}axis": {"title": {"text": f"achieved {escape(a)}, level units"}, "range": [low[i] - pad[i], high[i] + pad[i]]}
        for i, (name, a) in enumerate((("x", first), ("y", second)))
    }
    alt = f"Pareto plot, {first} to the right, {second} upwards, one mark per setting. {'; '.join(words)}."
    note = "one mark per setting; the line bounds what a method's settings dominate"
    return plot(f"{first} against {second}", alt, traces, 460, note=note, rows=drawn, **axes)


def _setting(cell: Mapping[str, Any]) -> str:
    return ",".join(map(str, cell["levels"]))


def _front_traces(method: str, names: Sequence[str], points: Any, on: Any, style: Style) -> list[Any]:
    """The staircase down to the reference point, and the marks over it; of a trained method, settings on the front are named."""
    best = points[on][np.argsort(points[on][:, 0], kind="stable")]
    xs: list[float] = [REFERENCE]
    ys: list[float] = []
    for x, y in best.tolist():
        xs += [x, x]
        ys += [y, y]
    stairs = go.Scatter(
        x=xs,
        y=[*ys, REFERENCE],
        mode="lines",
        line={"color": style.color, "width": 1.5},
        opacity=0.6,
        hoverinfo="skip",
    )
    marks = go.Scatter(
        x=points[:, 0].tolist(),
        y=points[:, 1].tolist(),
        name=escape(method),
        mode="markers+text",
        text=[name if here and not is_baseline(method) else "" for name, here in zip(names, on, strict=True)],
        textposition="top right",
        textfont={"size": 11, "color": style.color},
        customdata=list(names),
        marker={"color": style.color, "symbol": style.symbol, "size": 9},
        hovertemplate=f"{escape(method)} asked for %{{customdata}}: %{{x:.2f}}, %{{y:.2f}}<extra></extra>",
    )
    return [stairs, marks]
