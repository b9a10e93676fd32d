"""What a sweep leaves to read: one HTML page, a csv of every figure, and the table that the terminal shows.

All three come from `compare`'s values alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import escape

from ctrlray.stages import report_figures as figures
from ctrlray.stages.report_numbers import bounds, interval, number, outside, point
from ctrlray.stages.report_page import make_page
from ctrlray.stages.report_tables import Cell, Table, duration_cell, metric_cell, number_cell, table
from ctrlray.sweep.compare import STATISTICS

TEMPLATE = "sweep.html.j2"
_BASE, _OTHER = "#808080", "#2f7fc1"
_PLOTTED = {"ends": 0.5, "slope": 0.0}
"""Statistics that are drawn, those that any number of levels has in common, and where nothing follows the dial."""
MAX_P = 0.05
_HIGHER = {"pairwise", "ends", "spearman_level_means", "slope"}
_WHAT = ("variant", "state", "attribute", "statistic")
_FIGURES = ("value", "low", "high", "difference", "difference_low", "difference_high", "p", "p_holm")
Comparison = Mapping[str, Any]


def attributes_of(found: Comparison) -> list[str]:
    """Every attribute that some variant has, in order of appearance."""
    return list(dict.fromkeys(a for v in found["variants"] for a in v["attributes"]))


def csv_text(found: Comparison) -> str:
    """One line per variant, attribute and statistic; a variant that failed has one line with its error."""
    sink = io.StringIO()
    rows = csv.writer(sink, lineterminator="\n")
    rows.writerow([*_WHAT, *_FIGURES, "error"])
    for v in found["variants"]:
        if not v["attributes"]:
            rows.writerow([v["variant"], v["state"], "", "", *[""] * len(_FIGURES), v["error"]])
        for attribute, values in v["attributes"].items():
            for key in STATISTICS:
                of, apart = values[key], values[key].get("difference") or {}
                numbers = [d.get(part) for d in (of, apart) for part in ("value", "low", "high")]
                numbers += [apart.get(part) for part in ("p", "p_holm")]
                rows.writerow([v["variant"], v["state"], attribute, key, *("" if n is None else n for n in numbers), ""])
    return sink.getvalue()


def lines(found: Comparison) -> list[str]:
    """The table of the terminal: per attribute the order accuracy of the dial's ends, and its distance from the base's."""
    names = attributes_of(found)
    heads = [(f"{n}: lowest < highest", f"difference to {found['base']}") for n in names]
    made = [_line("variant", heads)]
    for v in found["variants"]:
        if v["state"] == "failed":
            made.append(_line(v["variant"], [("failed: " + " ".join(v["error"].split())[:150], "")]))
        else:
            values = [v["attributes"].get(n, {}).get("ends") or {} for n in names]
            made.append(_line(v["variant"], [(_worded(x), _worded(x.get("difference"))) for x in values]))
    return made


def _line(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    return (f"{name:<24} " + " ".join(f"{first:<32} {second:<30}" for first, second in pairs)).rstrip()


def _worded(value: Any) -> str:
    return f"{number(point(value), 3)} {bounds(value, 3)}".strip() if value else ""


def render(found: Comparison) -> str:
    """The page, which needs nothing but a browser."""
    names = attributes_of(found)
    return make_page(
        TEMPLATE,
        found=found,
        names=names,
        overview=overview(found),
        tables=[statistics_table(found, n) for n in names],
        figures=[f for n in names for key in _PLOTTED if (f := figure(found, n, key)) is not None],
        failed=[v for v in found["variants"] if v["state"] == "failed"],
    )


def overview(found: Comparison) -> Table:
    """What sets each variant apart, and what it took."""
    header = ("Variant", "Differs from the base in", "Method", "Examples", "Code gap", "Tokens per answer", "Own time")
    caption = "Variants. The code gap is in nats per token. Own time is from distillation to export; answers are shared."
    return table(caption, header, map(_overview_row, found["variants"]), numeric=False)


def _overview_row(v: Mapping[str, Any]) -> list[Cell]:
    apart = Cell("; ".join(v["changes"]) or "nothing: it is the base")
    if v["state"] == "failed":
        return [Cell(v["variant"]), apart, Cell("failed", tone="bad"), *[number_cell(None)] * 4]
    return [
        Cell(v["variant"]),
        apart,
        Cell(v["method"]),
        number_cell(v["examples"]),
        metric_cell(v["code_gap"], 0.0, digits=3),
        number_cell(v["mean_tokens"], 1),
        duration_cell(v["seconds"]),
    ]


def statistics_table(found: Comparison, attribute: str) -> Table:
    """One attribute: each statistic and its paired difference to the base."""
    header = ["Variant", "Levels", *(h for s in STATISTICS.values() for h in (s.title, "Difference"))]
    rows = []
    for v in found["variants"]:
        if (values := v["attributes"].get(attribute)) is not None:
            row = [Cell(v["variant"]), number_cell(values["levels"])]
            for key in STATISTICS:
                row += [metric_cell(values[key]), _difference_cell(values[key].get("difference"), key)]
            rows.append(row)
    return table(f"{attribute}: values and paired differences to {found['base']}, with 95% intervals", header, rows)


def _difference_cell(value: Any, key: str) -> Cell:
    """Green where a variant is better than the base, red where it is worse: the interval, and p after Holm, leave no doubt."""
    if value is None:
        return number_cell(None)
    side = outside(value, 0.0) * (1 if key in _HIGHER else -1)
    adjusted = value.get("p_holm")
    sure = adjusted is None or adjusted < MAX_P
    note = bounds(value) + (f" p {number(adjusted, 3)}" if adjusted is not None else "")
    return number_cell(value, note=note.strip(), tone={1: "good", -1: "bad", 0: ""}[side] if sure else "")


def figure(found: Comparison, attribute: str, key: str) -> figures.Figure | None:
    """Every variant's value with its interval, top to bottom as in the table; dotted where nothing follows the dial."""
    shown = [(v["variant"], v["attributes"].get(attribute, {}).get(key)) for v in found["variants"]]
    known = [(name, value, ci) for name, value in shown if value is not None and (ci := interval(value)) is not None]
    if not known:
        return None
    title = f"{attribute}: {STATISTICS[key].title[0].lower()}{STATISTICS[key].title[1:]}"
    words = ", ".join(f"{name} {_worded(value)}" for name, value, _ in known)
    traces = [_mark(name, ci, _BASE if name == found["base"] else _OTHER) for name, _, ci in known]
    none = _PLOTTED[key]
    yaxis = {"type": "category", "autorange": "reversed", "showgrid": False}
    note = f"grey {found['base']}; dotted at {none:g}, where nothing follows the dial"
    more: dict[str, Any] = {"yaxis": yaxis, "shapes": [figures.dotted(x=none)]}
    return figures.plot(title, f"{title}: {words}.", traces, 90 + 30 * len(known), note=note, **more)


def _mark(name: str, ci: Sequence[float], color: str) -> Any:
    value, low, high = ci
    spread = {"type": "data", "array": [high - value], "arrayminus": [value - low], "color": color, "thickness": 1.6, "width": 4}
    return go.Scatter(
        x=[value],
        y=[str(escape(name))],
        error_x=spread,
        mode="markers",
        marker={"color": color, "size": 10},
        hovertemplate=f"{escape(name)}: {value:.3f} [{low:.3f}, {high:.3f}]<extra></extra>",
    )
