"""The report's verdict: what the numbers support, in plain sentences, and what each alarm suggests to try next."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrlray.stages.report_tables import interval, number, outside, percent, unaccounted

BASELINES = frozenset({"start", "prompting", "reranking"})
FEW_PROMPTS = 50

ADVICE = {
    "settings-do-not-change-the-output": (
        "Train longer, raise train.control_rate or the objective's weight, and look at the code gap: "
        "as long as it is zero, the model does not read its code."
    ),
    "answers-collapse-to-the-extremes": (
        "Use a milder strategy (distill.strategy: balance), a larger distill.outer, or fewer levels; "
        "look at the sample answers for one that repeats itself."
    ),
    "empty-cell": (
        "Sample more answers (generate.samples), add behaviours that reach this cell, or ask for fewer levels."
    ),
    "cells-unbalanced-after-balance": (
        "Raise generate.samples or lower distill.max_examples, so that every cell has rows enough."
    ),
    "ledger-does-not-balance": (
        "Rows went missing without a reason: do not trust this run's numbers; look at the tables of the stage "
        "that is named, and report it as a bug."
    ),
    "reward-and-judge-part": (
        "Reward hacking: raise the objective's kl.coefficient or train for fewer steps, and read answers of the last ones."
    ),
    "most-answers-truncated": "Raise sampling.max_tokens, or add a behaviour that asks for short complete answers.",
    "rows-quarantined": "Read the quarantine table: it holds each row's id and error.",
    "no-code-gap": "The model does not read its code: more epochs, a higher control_rate, or a larger ExMATE weight.",
    "rewards-correlated": (
        "Dials cannot move apart where their rewards do not: use rewards that disagree, or more behaviours."
    ),
    "length-explains-the-dial": (
        "The reward follows answer length: use a reward that is neutral to length, or ask for answers of equal length."
    ),
}
"""What to try next, by alarm. Names match in any case, with spaces, dashes or underscores."""


@dataclass(frozen=True)
class Finding:
    """One sentence on one method, with a tone: good, bad or muted (no effect shown)."""

    method: str
    text: str
    tone: str


@dataclass(frozen=True)
class Verdict:
    """The headline, the findings on trained methods and on baselines, and what to keep in mind."""

    headline: str
    findings: tuple[Finding, ...]
    baselines: tuple[Finding, ...]
    caveats: tuple[str, ...]


def verdict(attributes: Sequence[str], metrics: Mapping[str, Any], code_gaps: Mapping[str, Any]) -> Verdict:
    """Say per method and attribute whether the dial works, by intervals alone."""
    findings = []
    for method in dict.fromkeys([*metrics, *code_gaps]):
        result = metrics.get(method) or {}
        for i, attribute in enumerate(attributes):
            if (result.get("attributes") or {}).get(attribute):
                findings.append(_attribute_finding(method, attribute, i, attributes, result))
        if code_gaps.get(method):
            findings.append(_gap_finding(method, code_gaps[method]))
    trained = tuple(f for f in findings if not is_baseline(f.method))
    baselines = tuple(f for f in findings if is_baseline(f.method))
    return Verdict(_headline(attributes, metrics, code_gaps), trained, baselines, tuple(_caveats(metrics)))


def is_baseline(method: str) -> bool:
    """True for a method that nothing was trained for."""
    return method.lower() in BASELINES


def _pairwise(result: Mapping[str, Any], attribute: str) -> Any:
    return ((result.get("attributes") or {}).get(attribute) or {}).get("pairwise")


def _headline(attributes: Sequence[str], metrics: Mapping[str, Any], code_gaps: Mapping[str, Any]) -> str:
    trained = [m for m in metrics if not is_baseline(m)]
    if not metrics:
        return "This run has no evaluation, so nothing can be said about the dial."
    if not trained:
        return "Only baselines were evaluated: no trained dial to judge."
    sentences = []
    for method in trained:
        sentences.append(_method_headline(method, attributes, metrics[method]))
        if code_gaps.get(method):
            sentences.append(_gap_headline(method, code_gaps[method]))
    return " ".join([*sentences, *_baseline_headline(attributes, metrics)])


def _method_headline(method: str, attributes: Sequence[str], result: Mapping[str, Any]) -> str:
    works = [a for a in attributes if outside(_pairwise(result, a), 0.5) > 0]
    fails = [a for a in attributes if a not in works]
    length = [a for a in works if _length(1, result["attributes"][a])]
    if not works:
        return f"{method} shows no dial that this evaluation can tell from chance."
    text = f"With {method}, {_join(works)} {'follow' if len(works) > 1 else 'follows'} the dial"
    if length:
        text += f" ({_join(length)} not once answer length is held constant)"
    if fails:
        text += f"; {_join(fails)} {'do' if len(fails) > 1 else 'does'} not measurably"
    return f"{text}."


def _baseline_headline(attributes: Sequence[str], metrics: Mapping[str, Any]) -> list[str]:
    """What the instruction alone achieves; the starting model sees no setting, so it has nothing to say."""
    if "prompting" not in metrics:
        return []
    works = [a for a in attributes if outside(_pairwise(metrics["prompting"], a), 0.5) > 0]
    return [f"Prompting alone moves {_join(works) if works else 'nothing measurably'}."]


def _gap_headline(method: str, gap: Mapping[str, Any]) -> str:
    side = outside(gap, 0.0)
    if side > 0:
        size = number(gap["value"], 3)
        return f"On held-out examples {method} reads its control codes (code gap {size} nats per token)."
    return f"On held-out examples {method} does not measurably read its control codes."


def _attribute_finding(
    method: str, attribute: str, index: int, attributes: Sequence[str], result: Mapping[str, Any]
) -> Finding:
    measured = result["attributes"][attribute]
    pairwise = measured.get("pairwise")
    found = interval(pairwise)
    if not found:
        return Finding(method, f"{attribute}: no comparable pairs, so no statement.", "muted")
    shown = f"{percent(found[0])} of pairs, 95% interval {percent(found[1], 1)} to {percent(found[2], 1)}, chance 50%"
    side = outside(pairwise, 0.5)
    if side > 0:
        text = f"{attribute} follows its setting: the higher setting scores higher in {shown}."
    elif side < 0:
        text = f"{attribute} moves against its setting: the higher setting scores higher in only {shown}."
    else:
        text = f"{attribute} does not measurably follow its setting: the higher setting scores higher in {shown}."
    text += _size(index, result) + _length(side, measured) + _spill(index, attributes, result)
    return Finding(method, text, {1: "good", -1: "bad", 0: "muted"}[side])


def _size(index: int, result: Mapping[str, Any]) -> str:
    value = interval(_slope(result, index, index))
    return f" One requested level moves the score by {number(value[0])} levels (ideal 1)." if value else ""


def _length(side: int, measured: Mapping[str, Any]) -> str:
    adjusted = (measured.get("length_adjusted") or {}).get("pairwise")
    found = interval(adjusted)
    if not side or not found or outside(adjusted, 0.5) == side:
        return ""
    value, low, high = percent(found[0]), percent(found[1], 1), percent(found[2], 1)
    return f" With answer length held constant this is no longer shown ({value}, {low} to {high})."


def _spill(index: int, attributes: Sequence[str], result: Mapping[str, Any]) -> str:
    moved = []
    for j, other in enumerate(attributes):
        value = _slope(result, index, j)
        if j != index and outside(value, 0.0):
            moved.append(f"{other} by {number(value['value'])}")
    return f" It also moves {_join(moved)} levels per level." if moved else ""


def _slope(result: Mapping[str, Any], i: int, j: int) -> Any:
    slopes = result.get("slopes") or []
    return slopes[i][j] if i < len(slopes) and j < len(slopes[i]) else None


def _gap_finding(method: str, gap: Mapping[str, Any]) -> Finding:
    found = interval(gap)
    if not found:
        return Finding(method, "The code gap could not be measured.", "muted")
    shown = f"{number(found[0], 3)} nats per token [{number(found[1], 3)}, {number(found[2], 3)}]"
    shown += f", {number(gap.get('num_examples'))} held-out examples"
    side = outside(gap, 0.0)
    if side > 0:
        text = f"A wrong code makes held-out answers less likely ({shown}): the model reads its code."
        return Finding(method, text, "good")
    if side < 0:
        text = f"A wrong code makes held-out answers more likely ({shown}): the code is read wrongly."
        return Finding(method, text, "bad")
    return Finding(method, f"A wrong code makes no measurable difference to held-out answers ({shown}).", "muted")


def _caveats(metrics: Mapping[str, Any]) -> list[str]:
    prompts = [r["num_prompts"] for r in metrics.values() if r.get("num_prompts")]
    if not prompts:
        return []
    lines = ["Each interval stands alone (95%, bootstrap over prompts); among many, some exclude chance by luck."]
    if min(prompts) < FEW_PROMPTS:
        lines.append(f"Only {min(prompts)} prompts were evaluated: intervals are wide and small effects cannot show.")
    return lines


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def alarms_of(alarms: Sequence[Mapping[str, Any]], ledger: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The run's alarms with advice, worst first, with one more for each stage whose rows do not add up."""
    found = [dict(a) for a in alarms]
    for stage in ledger:
        missing = unaccounted(stage)
        if missing:
            how = f"{number(abs(missing))} rows {'are unaccounted for' if missing > 0 else 'appear from nowhere'}"
            detail = f"{stage.get('stage')}: {how}."
            found.append({"name": "ledger does not balance", "severity": "error", "detail": detail})
    order = {"error": 0, "warning": 1, "info": 2}
    shown = [
        {
            "name": str(a.get("name", "unnamed")).replace("_", " "),
            "severity": a["severity"] if a.get("severity") in order else "warning",
            "detail": str(a.get("detail") or ""),
            "advice": str(a.get("advice") or advice(str(a.get("name", "")))),
        }
        for a in found
    ]
    return sorted(shown, key=lambda a: order[a["severity"]])


def advice(name: str) -> str:
    """What to try after an alarm; empty when nothing is known about it."""
    return ADVICE.get(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), "")
