"""Figures of the report: plotly specifications with a description in words.

One small plot each, so that a phone can stack them.
Colours of text, axes and grids are left to the page's style sheet, which follows light, dark and print.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from ctrlray.stages.report_tables import bounds, interval, is_number, level_means, levels_of, number, point

BEFORE, AFTER = "#8a8a8a", "#2f7fc1"
MAX_HEAT_LEVELS = 10

CURVES = {
    "valid_gap": ("Held-out code gap", "nats per token; above 0 the model reads its code"),
    "valid_nll": ("Held-out loss", "nats per token"),
    "nll": ("Training loss, right code", "nats per token"),
    "loss": ("Training objective", "as optimised"),
    "leak": ("Leak: likelihood under a wrong code", "0 to 1, lower is better"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", "of the adapters"),
    "reward": ("Reward", "level units; 0 is every requested level reached"),
    "kl": ("KL to the model it started from", "nats per response, same code"),
    "kl_base": ("KL to that model without a code", "nats per response"),
    "next_kl_coefficient": ("KL coefficient", "level units per nat"),
    "entropy": ("Entropy", "nats per token"),
    "length": ("Length of answers", "tokens"),
    "truncated": ("Answers cut off", "share of the rollouts"),
    "clip_fraction": ("Clipped tokens", "share"),
    "ratio_spread": ("Spread of the policy ratio", "standard deviation over tokens"),
    "explained_variance": ("Explained variance of the critic", "1 is perfect, 0 is none"),
    "mismatch": ("Trainer against engine", "mean difference of log-probs, nats per token"),
    "importance": ("Importance weight", "mean over tokens"),
    "staleness": ("Staleness of the rollouts", "versions of the weights"),
    "prefix_hit_rate": ("Prefix cache", "share of prompt tokens found in it"),
}
PHASES = ("generate", "score", "sync", "measure", "forward", "backward", "optimizer", "publish")
"""Seconds of a step of reinforcement learning, in the order in which they pass; curves call them `<phase>_s`."""
_LEVEL_COLORS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#d9c21e", "#e08a00", "#d55e00")


@dataclass(frozen=True)
class Style:
    """How one method is drawn everywhere: a colour that colour-blind readers can tell, and a mark."""

    color: str
    symbol: str
    glyph: str


_STYLES = {
    "start": Style("#808080", "circle", "\N{BLACK CIRCLE}"),
    "prompting": Style("#e08a00", "square", "\N{BLACK SQUARE}"),
    "exmate": Style("#2f7fc1", "triangle-up", "\N{BLACK UP-POINTING TRIANGLE}"),
    "clm": Style("#009e73", "diamond", "\N{BLACK DIAMOND}"),
    "reranking": Style("#c765a0", "triangle-down", "\N{BLACK DOWN-POINTING TRIANGLE}"),
    "ppo": Style("#d55e00", "star", "\N{BLACK STAR}"),
}
_MORE = (
    Style("#a06cd5", "pentagon", "\N{BLACK PENTAGON}"),
    Style("#56b4e9", "hexagon", "\N{BLACK HEXAGON}"),
    Style("#b08d57", "triangle-left", "\N{BLACK LEFT-POINTING TRIANGLE}"),
    Style("#7d9f35", "triangle-right", "\N{BLACK RIGHT-POINTING TRIANGLE}"),
)


@dataclass(frozen=True)
class Figure:
    """One plot: its title and description for readers, its specification for plotly.js."""

    title: str
    alt: str
    spec: Markup
    height: int
    note: str = ""
    """A second line under the title."""


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style per method; the known ones keep theirs in every report."""
    spare = itertools.cycle(_MORE)
    return {m: _STYLES[m] if m in _STYLES else next(spare) for m in dict.fromkeys(methods)}


def plot(title: str, alt: str, traces: Sequence[Any], height: int, *, note: str = "", **layout: Any) -> Figure:
    """A figure in the report's looks; `layout` is plotly's."""
    figure = go.Figure(list(traces))
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 52, "r": 14, "t": 10, "b": 46},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=layout.pop("showlegend", False),
        dragmode=False,
        hovermode="closest",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#808080"},
        **layout,
    )
    axis = {
        "fixedrange": True,
        "automargin": True,
        "title": {"font": {"size": 13}},
        "gridcolor": "#cccccc",
        "zerolinecolor": "#aaaaaa",
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    json = str(figure.to_json()).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Figure(title, alt, Markup(json), height, note)


def cell_figures(
    attributes: Sequence[str], levels: Sequence[int], before: Mapping[str, int], after: Mapping[str, int]
) -> list[Figure]:
    """Rows per level: two heat maps for two attributes, else bars of each attribute's own levels."""
    if not before and not after:
        return []
    if len(attributes) == 2 and max(levels) <= MAX_HEAT_LEVELS:
        named = (("Before distillation", before), ("After distillation", after))
        return [_cell_heat(name, attributes, levels, cells) for name, cells in named if cells]
    return [_level_bars(a, i, levels[i], before, after) for i, a in enumerate(attributes)]


def _cell_heat(name: str, attributes: Sequence[str], levels: Sequence[int], cells: Mapping[str, int]) -> Figure:
    rows, columns = (range(1, n + 1) for n in levels)
    counts = [[cells.get(f"{r},{c}", 0) for c in columns] for r in rows]
    top = max(1, *(n for row in counts for n in row))
    worded = (f"{attributes[0]} {r}: {', '.join(map(str, row))}" for r, row in zip(rows, counts, strict=True))
    alt = f"Heat map, rows per level cell. {attributes[1]} 1 to {levels[1]} from left to right. {'; '.join(worded)}."
    trace = _heat([str(c) for c in columns], [str(r) for r in rows], counts, counts, "Blues", zmin=0, zmax=top)
    trace.hovertemplate = f"{attributes[0]} %{{y}}, {attributes[1]} %{{x}}: %{{z}} rows<extra></extra>"
    height = 110 + 46 * levels[0]
    title = f"{name}: {number(sum(cells.values()))} rows"
    return plot(title, alt, [trace], height, xaxis=_category(attributes[1]), yaxis=_category(attributes[0]))


def _heat(x: Sequence[str], y: Sequence[str], z: Any, text: Any, scale: str, **limits: float) -> Any:
    return go.Heatmap(
        x=x, y=y, z=z, text=text, texttemplate="%{text}", colorscale=scale, showscale=False, xgap=2, ygap=2, **limits
    )


def _category(title: str, **more: Any) -> dict[str, Any]:
    return {"type": "category", "title": {"text": escape(title)}, "showgrid": False, **more}


def _level_bars(attribute: str, index: int, levels: int, before: Mapping[str, int], after: Mapping[str, int]) -> Figure:
    names = [str(level) for level in range(1, levels + 1)]
    traces, words = [], []
    for name, cells, color in (("before", before, BEFORE), ("after", after, AFTER)):
        if not cells:
            continue
        counts = [sum(n for cell, n in cells.items() if levels_of(cell)[index] == k) for k in range(1, levels + 1)]
        shares = [100 * n / max(1, sum(counts)) for n in counts]
        words.append(f"{name} {', '.join(f'{s:.0f}%' for s in shares)}")
        hover = f"{name}: %{{customdata}} rows, %{{y:.0f}}%<extra></extra>"
        traces.append(
            go.Bar(
                x=names,
                y=shares,
                name=name,
                text=counts,
                customdata=counts,
                hovertemplate=hover,
                marker={"color": color},
                textposition="outside",
                cliponaxis=False,
            )
        )
    alt = f"Bars, share of rows per level of {attribute}, levels 1 to {levels}: {'; '.join(words)}."
    top = max(max(t.y) for t in traces) * 1.18 or 1
    yaxis = {"title": {"text": "% of rows"}, "range": [0, top]}
    note = "grey before distillation, blue after"
    return plot(
        attribute, alt, traces, 270, note=note, xaxis=_category(f"{attribute} level"), yaxis=yaxis, bargap=0.25
    )


def curve_figures(curves: Mapping[str, Sequence[Mapping[str, Any]]], look: Mapping[str, Style]) -> list[Figure]:
    """One plot per recorded quantity, all methods in it; quantities that were never recorded are left out."""
    figures = []
    for key, (title, unit) in CURVES.items():
        traces, words = [], []
        for method, points in curves.items():
            kept = [(p["step"], p[key]) for p in points if is_number(p.get("step")) and is_number(p.get(key))]
            if kept:
                traces.append(_curve(method, kept, look[method]))
                (first, start), (last, end) = kept[0], kept[-1]
                words.append(f"{method} from {start:.3g} at step {first} to {end:.3g} at step {last}")
        if traces:
            shapes = _zero_line() if key == "valid_gap" else []
            layout = {"xaxis": {"title": {"text": "optimizer step"}}, "yaxis": _curve_axis(key), "shapes": shapes}
            alt = f"{title} by step: {'; '.join(words)}."
            figures.append(plot(title, alt, traces, 250, note=unit, **layout))
    return figures


def achieved_figures(attributes: Sequence[str], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """Per attribute: what answers reached by the level that they were asked for, along reinforcement learning."""
    figures = []
    for name in attributes:
        for method, points in curves.items():
            start = f"achieved_{name}_"
            levels = sorted({int(k.removeprefix(start)) for p in points for k in p if k.startswith(start)})
            if not levels:
                continue
            traces, shapes, words = [], [], []
            for i, level in enumerate(levels):
                color = _LEVEL_COLORS[round(i * 9 / max(1, len(levels) - 1))]
                kept = [(p["step"], p[f"{start}{level}"]) for p in points if is_number(p.get(f"{start}{level}"))]
                traces.append(_curve(f"level {level}", kept, Style(color, "circle", "")))
                dotted = {"dash": "dot", "width": 1, "color": color}
                shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": dotted})
                words.append(f"level {level} from {kept[0][1]:.2f} to {kept[-1][1]:.2f}")
            more: dict[str, Any] = {"xaxis": _axis("step"), "yaxis": _axis("level units"), "shapes": shapes}
            title = f"{name} reached by level asked for, {method}"
            alt = f"{title}: {'; '.join(words)}."
            figures.append(plot(title, alt, traces, 280, note="dotted: the level itself", **more, showlegend=True))
    return figures


def phase_figures(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """Where the seconds of reinforcement learning go, step by step."""
    figures = []
    for method, points in curves.items():
        if not any(is_number(p.get("generate_s")) for p in points):
            continue
        traces, words = [], []
        for i, phase in enumerate(PHASES):
            values = [p.get(f"{phase}_s", 0.0) for p in points]
            words.append(f"{phase} {sum(values) / len(values):.2f} s")
            color = _LEVEL_COLORS[(i * 7) % 10]
            traces.append(go.Bar(x=[p["step"] for p in points], y=values, name=phase, marker={"color": color}))
        title = f"Seconds of a step, {method}"
        alt = f"{title}, means: {', '.join(words)}."
        more: dict[str, Any] = {"xaxis": _axis("step"), "yaxis": _axis("seconds"), "barmode": "stack"}
        figures.append(plot(title, alt, traces, 280, **more, showlegend=True))
    return figures


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}}


def _curve_axis(key: str) -> dict[str, Any]:
    if key == "lr":
        return {"exponentformat": "power"}
    return {"rangemode": "tozero"} if key in ("valid_gap", "leak", "truncated", "staleness") else {}


def _zero_line() -> list[dict[str, Any]]:
    line = {"dash": "dot", "width": 1.5, "color": "#808080"}
    return [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": line}]


def _curve(method: str, kept: Sequence[tuple[float, float]], style: Style) -> Any:
    few = len(kept) <= 25
    return go.Scatter(
        x=[step for step, _ in kept],
        y=[value for _, value in kept],
        name=escape(method),
        mode="lines+markers" if few else "lines",
        line={"color": style.color, "width": 2},
        marker={"color": style.color, "symbol": style.symbol, "size": 8},
        hovertemplate=f"{escape(method)}, step %{{x}}: %{{y:.4g}}<extra></extra>",
    )


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
    return plot(attribute, alt, traces, 340, xaxis=xaxis, yaxis=yaxis)


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
    trace = _heat(names, names, values, texts, "RdBu", zmin=-1, zmax=1)
    trace.hovertemplate = "requested %{y}, achieved %{x}: %{z:.3f}<extra></extra>"
    alt = f"Slope matrix of {name}, achieved levels per requested level. Requested {'; requested '.join(worded)}."
    xaxis = _category("achieved")
    yaxis = _category("requested", autorange="reversed", tickangle=-90 if len(names) < 4 else 0)
    return plot(name, alt, [trace], 110 + 84 * len(names), xaxis=xaxis, yaxis=yaxis)
