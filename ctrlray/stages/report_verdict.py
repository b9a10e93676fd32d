"""The report's verdict: what the numbers support, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrlray.stages.report_numbers import interval, number, outside, percent

BASELINES = frozenset({"start", "prompting", "reranking"})
FEW_PROMPTS = 50


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


def verdict(
    attributes: Sequence[str], metrics: Mapping[str, Any], code_gaps: Mapping[str, Any], judge: Mapping[str, Any]
) -> Verdict:
    """Say per method and attribute whether the dial works, by intervals alone; `judge` is empty without judges."""
    findings = []
    for method in dict.fromkeys([*metrics, *code_gaps]):
        result = metrics.get(method) or {}
        for i, attribute in enumerate(attributes):
            if (result.get("attributes") or {}).get(attribute):
                judged = _pairwise(judge.get(method) or {}, attribute)
                findings.append(_attribute_finding(method, i, attributes, result, judged))
        if code_gaps.get(method):
            findings.append(_gap_finding(method, code_gaps[method]))
    trained = tuple(f for f in findings if not is_baseline(f.method))
    baselines = tuple(f for f in findings if is_baseline(f.method))
    return Verdict(_headline(attributes, metrics, code_gaps, judge), trained, baselines, tuple(_caveats(metrics)))


def is_baseline(method: str) -> bool:
    """True for a method that nothing was trained for."""
    return method.lower() in BASELINES


def _pairwise(result: Mapping[str, Any], attribute: str) -> Any:
    return ((result.get("attributes") or {}).get(attribute) or {}).get("pairwise")


def _headline(
    attributes: Sequence[str], metrics: Mapping[str, Any], code_gaps: Mapping[str, Any], judge: Mapping[str, Any]
) -> str:
    trained = [m for m in metrics if not is_baseline(m)]
    if not metrics:
        return "This run has no evaluation, so nothing can be said about the dial."
    if not trained:
        return "Only baselines were evaluated: no trained dial to judge."
    sentences = []
    for method in trained:
        sentences.append(_method_headline(method, attributes, metrics[method], judge.get(method) or {}))
        if code_gaps.get(method):
            sentences.append(_gap_headline(method, code_gaps[method]))
    return " ".join([*sentences, *_baseline_headline(attributes, metrics)])


def _method_headline(method: str, attributes: Sequence[str], result: Mapping[str, Any], judged: Mapping[str, Any]) -> str:
    works = [a for a in attributes if outside(_pairwise(result, a), 0.5) > 0]
    fails = [a for a in attributes if a not in works]
    length = [a for a in works if _length(1, result["attributes"][a])]
    alone = [a for a in works if judged and outside(_pairwise(judged, a), 0.5) <= 0]
    if not works:
        return f"{method} shows no dial that this evaluation can tell from chance."
    text = f"With {method}, {_join(works)} {'follow' if len(works) > 1 else 'follows'} the dial"
    doubts = [f"{_join(length)} not once answer length is held constant"] if length else []
    doubts += [f"{_join(alone)} not in the judge's eyes"] if alone else []
    if doubts:
        text += f" ({'; '.join(doubts)})"
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


def _attribute_finding(method: str, index: int, attributes: Sequence[str], result: Mapping[str, Any], judged: Any) -> Finding:
    attribute = attributes[index]
    measured = result["attributes"][attribute]
    pairwise = measured.get("pairwise")
    found = interval(pairwise)
    if not found:
        return Finding(method, f"{attribute}: no comparable pairs, so no statement.", "muted")
    shown = f"{percent(found[0])} of pairs, 95% interval {_range(found)}, chance 50%"
    side = outside(pairwise, 0.5)
    if side > 0:
        text = f"{attribute} follows its setting: the higher setting scores higher in {shown}."
    elif side < 0:
        text = f"{attribute} moves against its setting: the higher setting scores higher in only {shown}."
    else:
        text = f"{attribute} does not measurably follow its setting: the higher setting scores higher in {shown}."
    text += _size(index, result) + _length(side, measured) + _judged(side, judged) + _spill(index, attributes, result)
    return Finding(method, text, {1: "good", -1: "bad", 0: "muted"}[side])


def _size(index: int, result: Mapping[str, Any]) -> str:
    value = interval(_slope(result, index, index))
    return f" One requested level moves the score by {number(value[0])} levels (ideal 1)." if value else ""


def _length(side: int, measured: Mapping[str, Any]) -> str:
    adjusted = (measured.get("length_adjusted") or {}).get("pairwise")
    found = interval(adjusted)
    if not side or not found or outside(adjusted, 0.5) == side:
        return ""
    return f" With answer length held constant this is no longer shown ({percent(found[0])}, {_range(found)})."


def _judged(side: int, judged: Any) -> str:
    """Whether the judge sees the same; nothing is said of what the training reward does not show."""
    found = interval(judged)
    if not side or not found:
        return ""
    says = {side: "agrees", -side: "sees the opposite"}.get(outside(judged, 0.5), "does not see it")
    return f" The judge {says} ({percent(found[0])}, {_range(found)})."


def _range(found: tuple[float, float, float]) -> str:
    return f"{percent(found[1], 1)} to {percent(found[2], 1)}"


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
