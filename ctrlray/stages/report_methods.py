"""Tables of the evaluated methods: how well they follow the dial, what they trade, and what their answers are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ctrlray.stages.report_numbers import NONE, bounds, number
from ctrlray.stages.report_tables import Cell, Table, metric_cell, number_cell, percent_cell, table

SIGNIFICANT = 0.05
METRICS = {
    "pairwise": ("Pairwise order accuracy", "chance 0.5"),
    "mae": ("Mean absolute error", "levels; 0 is best"),
    "bias": ("Bias", "levels; 0 is best"),
    "spearman_level_means": ("Spearman, level means", "1 is best"),
    "kendall_level_means": ("Kendall, level means", "1 is best"),
    "monotone_prompts": ("Prompts that rise at every level", "1 is best"),
    "spearman_rows": ("Spearman, rows", "1 is best"),
}
_CHANCE = {"pairwise": 0.5}
JUDGED = ("pairwise", "mae", "spearman_level_means")
"""What is shown again under the judge."""
HIGHER = {"pairwise": True, "mae": False}
"""Statistics that methods are compared by, and whether more of it is better."""
Tests = Sequence[Mapping[str, Any]]
"""Paired tests, as `ctrlray.metrics.compare` makes them."""


def metric_table(
    attribute: str, metrics: Mapping[str, Any], judge: Mapping[str, Any], tests: Tests = (), judge_tests: Tests = ()
) -> Table | None:
    """One attribute, a row per method: under the training reward, and beside it under the judge."""
    rows = []
    for method, own in _of_attribute(metrics, attribute).items():
        judged = _of_attribute(judge, attribute).get(method, {})
        better = {s: better_than(method, attribute, s, tests) for s in HIGHER}
        judged_better = {s: better_than(method, attribute, s, judge_tests) for s in HIGHER}
        rows.append(_metric_row(method, own, judged if judge else None, better, judged_better))
    return _metric_table(f"{attribute}: values with 95% intervals", rows, bool(judge))


def length_table(attribute: str, metrics: Mapping[str, Any], judge: Mapping[str, Any]) -> Table | None:
    """The same with what answer length explains of the scores taken away."""
    rows = []
    for method, own in _of_attribute(metrics, attribute).items():
        judged = _of_attribute(judge, attribute).get(method, {}).get("length_adjusted") or {}
        if own.get("length_adjusted"):
            rows.append(_metric_row(method, own["length_adjusted"], judged if judge else None, {}, {}))
    return _metric_table(f"{attribute} with answer length held constant", rows, bool(judge))


def _of_attribute(metrics: Mapping[str, Any], attribute: str) -> dict[str, Any]:
    found = {m: (r.get("attributes") or {}).get(attribute) for m, r in metrics.items()}
    return {m: r for m, r in found.items() if r}


def _metric_table(caption: str, rows: Sequence[Sequence[Cell]], judge: bool) -> Table | None:
    titles = [f"{name} ({ideal})" for name, ideal in (METRICS[k] for k in (*METRICS, *(JUDGED if judge else ())))]
    groups = (("", 1), ("Training reward", len(METRICS)), ("Judge", len(JUDGED))) if judge else ()
    return table(caption, ("Method", *titles), rows, groups=groups) if rows else None


def _metric_row(
    method: str,
    own: Mapping[str, Any],
    judged: Mapping[str, Any] | None,
    better: Mapping[str, tuple[str, ...]],
    judged_better: Mapping[str, tuple[str, ...]],
) -> list[Cell]:
    cells = [metric_cell(own.get(k), _CHANCE.get(k), better.get(k, ())) for k in METRICS]
    if judged is not None:
        cells += [metric_cell(judged.get(k), _CHANCE.get(k), judged_better.get(k, ())) for k in JUDGED]
    return [Cell(method, method=method), *cells]


def better_than(method: str, attribute: str, statistic: str, tests: Tests) -> tuple[str, ...]:
    """Methods that this one beats: Holm's p-value of the paired test below 0.05, in the better direction."""
    found = []
    for c in tests:
        if (c["attribute"], c["statistic"]) != (attribute, statistic) or c["value"] is None or not c["p_holm"] < SIGNIFICANT:
            continue
        winner, loser = (c["first"], c["second"]) if (c["value"] > 0) == HIGHER[statistic] else (c["second"], c["first"])
        if winner == method:
            found.append(loser)
    return tuple(found)


def comparison_table(tests: Tests, regime: str = "the training reward") -> Table:
    """Every paired test: the difference with its interval, its p-value and Holm's."""
    rows = [
        [
            Cell(f"{c['first']} minus {c['second']}"),
            Cell(c["attribute"]),
            Cell(METRICS[c["statistic"]][0]),
            number_cell({key: c[key] for key in ("value", "low", "high")}, 3),
            Cell(_p(c["p"]), value=c["p"]),
            Cell(_p(c["p_holm"]), tone="good" if c["p_holm"] < SIGNIFICANT else "muted", value=c["p_holm"]),
            number_cell(c["num_prompts"]),
        ]
        for c in tests
    ]
    header = ("Methods", "Attribute", "Statistic", "Difference", "p", "p after Holm", "Shared prompts")
    return table(f"Paired tests under {regime}, by 10,000 exchanges of the two methods' answers", header, rows)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(float(value), 3)


def correlation_table(correlation: Mapping[str, Any]) -> Table:
    """The judge against the training reward, on the same answers."""
    rows = [
        [
            Cell(a),
            metric_cell(c.get("overall"), 0.0),
            metric_cell(c.get("within_prompt"), 0.0),
            number_cell(c.get("num_answers")),
        ]
        for a, c in correlation.items()
    ]
    header = ("Attribute", "All answers", "Within a prompt", "Answers")
    return table("Correlation of the judge with the training reward, in level units of the data pool", header, rows)


def overview_table(metrics: Mapping[str, Any], code_gaps: Mapping[str, Any], spent: Mapping[str, Any]) -> Table:
    """One row per method: what was answered, how long the answers are, and the code gap."""
    header = (
        "Method",
        "Answers",
        "Prompts",
        "Tokens per answer",
        "Tokens spent on an answer",
        "Engine seconds spent on an answer",
        "Finished",
        "Prompts whose answers differ",
        "Code gap, nats/token",
        "Log-prob over the base's, nats/answer",
    )
    rows = []
    for method in dict.fromkeys([*metrics, *code_gaps]):
        result = metrics.get(method) or {}
        excluded, cost = result.get("num_excluded"), spent.get(method) or {}
        rows.append(
            [
                Cell(method, method=method),
                number_cell(result.get("num_rows"), note=f"{number(excluded)} more without a score" if excluded else ""),
                number_cell(result.get("num_prompts")),
                number_cell(result.get("mean_tokens"), 1),
                number_cell(cost.get("tokens"), 1),
                number_cell(cost.get("seconds"), 3),
                percent_cell(result.get("finished")),
                percent_cell(result.get("distinct_outputs")),
                gap_cell(code_gaps.get(method)),
                number_cell(result.get("kl_base"), 1),
            ]
        )
    caption = (
        "Methods on the same held-out prompts. What is spent on an answer counts all of reranking's candidates; seconds are "
        "those of the pool of engines, which answers in batches, without its start. The code gap is NLL under wrong codes minus "
        "that under the right one; the log-prob over the base's is the mean over answers of their log-prob under the code minus "
        "that under the base without one: where they were sampled at temperature 1 with nothing cut off, an unbiased estimate of "
        "the KL to the base; of greedy answers, how much likelier training made what a method says first"
    )
    return table(caption, header, rows)


def gap_cell(gap: Any) -> Cell:
    """The code gap with its interval and number of examples."""
    if not gap:
        return Cell(NONE, tone="muted")
    note = f"{bounds(gap, 3)} {number(gap.get('num_examples'))} examples"
    return replace(metric_cell(gap, 0.0, digits=3), note=note.strip())


def text_table(metrics: Mapping[str, Any]) -> Table | None:
    """What the answers are like, by method."""
    shown = {m: r["texts"] for m, r in metrics.items() if r.get("texts")}
    if not shown:
        return None
    rows = [
        [
            Cell(m, method=m),
            number_cell(t["tokens"], 1),
            *(number_cell(t[k]) for k in ("distinct_1", "distinct_2", "repetition")),
            percent_cell(t["refused"]),
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
        [Cell(m, method=m), number_cell(r.get("num_prompts")), *cells(r), *(cells(judge.get(m) or {}) if judge else [])]
        for m, r in metrics.items()
    ]
    header = ("Method", "Prompts", *attributes, *(attributes if judge else ()))
    groups = (("", 2), ("Training reward", len(attributes)), ("Judge", len(attributes))) if judge else ()
    return table(f"{name}: pairwise order accuracy (chance 0.5)", header, rows, groups=groups)
