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

from ctrlray.stages.report_numbers import number
from ctrlray.stages.report_tables import levels_of

BEFORE, AFTER = "#8a8a8a", "#2f7fc1"
Rows = list[Sequence[Any]]
"""What a figure draws, under a header."""
RISING = [[0.0, "#f7f7f5"], [1.0, "#8cc3e0"]]
DIVERGING = [[0.0, "#f2a68b"], [0.5, "#f7f7f5"], [1.0, "#8cc3e0"]]
"""Colours of heat maps: dark figures can be read on all of them."""
MAX_HEAT_LEVELS = 10


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
    rows: Sequence[Sequence[Any]] = ()
    """What is drawn, under a header, for who saves it as csv."""


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style per method; the known ones keep theirs in every report."""
    spare = itertools.cycle(_MORE)
    return {m: _STYLES[m] if m in _STYLES else next(spare) for m in dict.fromkeys(methods)}


def plot(
    title: str,
    alt: str,
    traces: Sequence[Any],
    height: int,
    *,
    note: str = "",
    rows: Sequence[Sequence[Any]] = (),
    **layout: Any,
) -> Figure:
    """A figure in the report's looks; `layout` is plotly's, `rows` are the data drawn, under a header."""
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
    # Python's own encoder: orjson, which plotly takes where it is installed, refuses lone surrogates in a text
    json = str(figure.to_json(engine="json")).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Figure(title, alt, Markup(json), height, note, rows)


def cell_figures(
    attributes: Sequence[str], levels: Sequence[int], before: Mapping[str, int], after: Mapping[str, int]
) -> list[Figure]:
    """Rows per level: two heat maps for two attributes, else bars of each attribute's own levels."""
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
    trace = heat([str(c) for c in columns], [str(r) for r in rows], counts, counts, RISING, zmin=0, zmax=top)
    trace.hovertemplate = f"{escape(attributes[0])} %{{y}}, {escape(attributes[1])} %{{x}}: %{{z}} rows<extra></extra>"
    more: dict[str, Any] = {"xaxis": category(attributes[1]), "yaxis": category(attributes[0])}
    drawn: Rows = [[*attributes, "rows"], *([r, c, cells.get(f"{r},{c}", 0)] for r in rows for c in columns)]
    title = f"{name}: {number(sum(cells.values()))} rows"
    return plot(title, alt, [trace], 110 + 46 * max(3, levels[0]), rows=drawn, **more)


def heat(x: Sequence[str], y: Sequence[str], z: Any, text: Any, scale: Any, **limits: float) -> Any:
    """A heat map with its values written into its cells."""
    return go.Heatmap(
        x=x,
        y=y,
        z=z,
        text=text,
        texttemplate="%{text}",
        textfont={"color": "#1c2126"},
        colorscale=scale,
        showscale=False,
        xgap=2,
        ygap=2,
        **limits,
    )


def category(title: str, **more: Any) -> dict[str, Any]:
    """An axis of names."""
    return {"type": "category", "title": {"text": escape(title)}, "showgrid": False, **more}


def _level_bars(attribute: str, index: int, levels: int, before: Mapping[str, int], after: Mapping[str, int]) -> Figure:
    names = [str(level) for level in range(1, levels + 1)]
    traces, words = [], []
    drawn: Rows = [["distillation", f"{attribute} level", "rows"]]
    for name, cells, color in (("before", before, BEFORE), ("after", after, AFTER)):
        if not cells:
            continue
        counts = [sum(n for cell, n in cells.items() if levels_of(cell)[index] == k) for k in range(1, levels + 1)]
        shares = [100 * n / max(1, sum(counts)) for n in counts]
        words.append(f"{name} {', '.join(f'{s:.0f}%' for s in shares)}")
        drawn += [[name, k, n] for k, n in enumerate(counts, 1)]
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
    more = {"xaxis": category(f"{attribute} level"), "yaxis": {**axis("% of rows"), "range": [0, top]}, "bargap": 0.25}
    note = "grey before distillation, blue after"
    return plot(attribute, alt, traces, 270, note=note, rows=drawn, **more)


def axis(title: str) -> dict[str, Any]:
    """An axis of numbers."""
    return {"title": {"text": escape(title)}}


def dotted(**where: Any) -> dict[str, Any]:
    """A dotted line across the plot: at `y`, or at `x`."""
    (name, at), *_ = where.items()
    along = "x" if name == "y" else "y"
    ends = {f"{along}ref": "paper", f"{along}0": 0, f"{along}1": 1, f"{name}0": at, f"{name}1": at}
    return {"type": "line", **ends, "line": {"dash": "dot", "width": 1.5, "color": "#808080"}}


def curve(method: str, kept: Sequence[tuple[float, float]], style: Style) -> Any:
    """One line over steps, with marks where there are few."""
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
