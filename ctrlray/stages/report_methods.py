"""Tables of the evaluated methods: how well they follow the dial, what they trade, and what their answers are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctrlray.stages.report_tables import (
    NONE,
    Cell,
    Table,
    bounds,
    metric_cell,
    number,
    percent,
    point,
    table,
)

SIGNIFICANT = 0.05
METRICS = {
    "pairwise": "Pairwise order accuracy (chance 0.5)",
    "mae": "Mean absolute error, levels (0 is best)",
    "bias": "Bias, levels (0 is best)",
    "spearman_level_means": "Spearman of the level means (1 is best)",
    "kendall_level_means": "Kendall of the level means (1 is best)",
    "monotone_prompts": "Prompts that rise at every level (1 is best)",
    "spearman_rows": "Spearman of the rows (1 is best)",
}
_CHANCE = {"pairwise": 0.5}
JUDGED = ("pairwise", "mae", "spearman_level_means")
"""What is shown again under the judge."""
HIGHER = {"pairwise": True, "mae": False}
"""Statistics that methods are compared by, and whether more of it is better."""


def metric_table(
    attribute: str, metrics: Mapping[str, Any], judge: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]
) -> Table | None:
    """One attribute: each method as measured, and again with answer length held constant; the judge's view to the right."""
    rows: list[list[Cell]] = []
    for method, result in metrics.items():
        measured = (result.get("attributes") or {}).get(attribute)
        if not measured:
            continue
        judged = ((judge.get(method) or {}).get("attributes") or {}).get(attribute) or {}
        better = {s: better_than(method, attribute, s, comparisons) for s in HIGHER}
        rows.append(_metric_row(Cell(method, method=method), measured, judged, bool(judge), better))
        adjusted = measured.get("length_adjusted")
        if adjusted:
            held = Cell(method, note="length held constant", method=method)
            rows.append(_metric_row(held, adjusted, judged.get("length_adjusted") or {}, bool(judge), {}))
    if not rows:
        return None
    header = ("Method", *METRICS.values(), *(METRICS[k] for k in JUDGED if judge))
    groups = (("", 1), ("Training reward", len(METRICS)), ("Judge", len(JUDGED))) if judge else ()
    return table(f"{attribute}: values with 95% intervals", header, rows, groups=groups)


def _metric_row(
    head: Cell,
    own: Mapping[str, Any],
    judged: Mapping[str, Any],
    judge: bool,
    better: Mapping[str, tuple[str, ...]],
) -> list[Cell]:
    cells = [metric_cell(own.get(k), _CHANCE.get(k), better.get(k, ())) for k in METRICS]
    return [head, *cells, *(metric_cell(judged.get(k), _CHANCE.get(k)) for k in JUDGED if judge)]


def better_than(method: str, attribute: str, statistic: str, comparisons: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Methods that this one beats: Holm's p-value of the paired test below 0.05, in the better direction."""
    found = []
    for c in comparisons:
        if (c["attribute"], c["statistic"]) != (attribute, statistic) or c["value"] is None or not c["p_holm"] < SIGNIFICANT:
            continue
        winner, loser = (c["first"], c["second"]) if (c["value"] > 0) == HIGHER[statistic] else (c["second"], c["first"])
        if winner == method:
            found.append(loser)
    return tuple(found)


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Every paired test: the difference with its interval, its p-value and Holm's."""
    rows = [
        [
            Cell(f"{c['first']} minus {c['second']}"),
            Cell(c["attribute"]),
            Cell(METRICS[c["statistic"]].split(" (")[0].split(",")[0]),
            Cell(number(c["value"], 3), note=bounds(c, 3)),
            Cell(_p(c["p"])),
            Cell(_p(c["p_holm"]), tone="good" if c["p_holm"] < SIGNIFICANT else "muted"),
            Cell(number(c["num_prompts"])),
        ]
        for c in comparisons
    ]
    header = ("Methods", "Attribute", "Statistic", "Difference", "p", "p after Holm", "Shared prompts")
    return table("Paired tests over shared prompts: 10,000 exchanges of the two methods' answers", header, rows)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(float(value), 3)


def correlation_table(correlation: Mapping[str, Any]) -> Table:
    """The judge against the training reward, on the same answers."""
    rows = [
        [
            Cell(a),
            metric_cell(c.get("overall"), 0.0),
            metric_cell(c.get("within_prompt"), 0.0),
            Cell(number(c.get("num_answers"))),
        ]
        for a, c in correlation.items()
    ]
    header = ("Attribute", "All answers", "Within a prompt", "Answers")
    return table("Correlation of the judge with the training reward, in level units of the data pool", header, rows)


def overview_table(metrics: Mapping[str, Any], code_gaps: Mapping[str, Any]) -> Table:
    """One row per method: what was answered, how long the answers are, and the code gap."""
    header = (
        "Method",
        "Answers",
        "Prompts",
        "Tokens per answer",
        "Finished",
        "Prompts whose answers differ",
        "Code gap, nats/token",
    )
    rows = []
    for method in dict.fromkeys([*metrics, *code_gaps]):
        result = metrics.get(method) or {}
        finished, excluded = point(result.get("finished")), result.get("num_excluded")
        rows.append(
            [
                Cell(method, method=method),
                Cell(number(result.get("num_rows")), note=f"{number(excluded)} more without a score" if excluded else ""),
                Cell(number(result.get("num_prompts"))),
                Cell(number(point(result.get("mean_tokens")), 1), note=bounds(result.get("mean_tokens"), 1)),
                Cell(percent(finished)),
                Cell(percent(point(result.get("distinct_outputs")))),
                gap_cell(code_gaps.get(method)),
            ]
        )
    caption = "Methods on the same held-out prompts. The code gap is NLL under wrong codes minus under the right one."
    return table(caption, header, rows)


def gap_cell(gap: Any) -> Cell:
    """The code gap with its interval and number of examples."""
    if not gap:
        return Cell(NONE, tone="muted")
    cell = metric_cell(gap, 0.0)
    value = point(gap)
    note = f"{bounds(gap, 3)} {number(gap.get('num_examples'))} examples"
    return Cell(number(value, 3), note=note.strip(), tone=cell.tone)


def text_table(metrics: Mapping[str, Any]) -> Table | None:
    """What the answers are like, by method."""
    shown = {m: r["texts"] for m, r in metrics.items() if r.get("texts")}
    if not shown:
        return None
    rows = [
        [
            Cell(m, method=m),
            Cell(number(point(t["tokens"]), 1), note=bounds(t["tokens"], 1)),
            *(metric_cell(t[k]) for k in ("distinct_1", "distinct_2", "repetition")),
            Cell(percent(point(t["refused"])), note=bounds(t["refused"])),
        ]
        for m, t in shown.items()
    ]
    header = ("Method", "Tokens per answer", "Distinct words", "Distinct pairs", "Repetition in an answer", "Refusals")
    return table("Answers. Distinct n-grams are counted over a prompt's answers, repetition is of 4-grams", header, rows)


def set_table(name: str, attributes: Sequence[str], metrics: Mapping[str, Any], judge: Mapping[str, Any]) -> Table:
    """One prompt set: pairwise order accuracy of each method, under the training reward and the judge."""

    def cells(result: Mapping[str, Any]) -> list[Cell]:
        return [metric_cell(((result.get("attributes") or {}).get(a) or {}).get("pairwise"), 0.5) for a in attributes]

    rows = [
        [Cell(m, method=m), Cell(number(r.get("num_prompts"))), *cells(r), *(cells(judge.get(m) or {}) if judge else [])]
        for m, r in metrics.items()
    ]
    header = ("Method", "Prompts", *attributes, *(attributes if judge else ()))
    groups = (("", 2), ("Training reward", len(attributes)), ("Judge", len(attributes))) if judge else ()
    return table(f"{name}: pairwise order accuracy (chance 0.5)", header, rows, groups=groups)
