"""How a reward agrees with human labels, source by source: every answer scored once, then only arithmetic.

labelled files ─► answers ─► scores (the score stage's actors) ─► measures by source ─► <name>.json, <name>.md
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrlray import config
from ctrlray.errors import ConfigError, DataError
from ctrlray.ledger import Progress, Silent
from ctrlray.rewards import measure
from ctrlray.rewards.data import Labels, read_labels
from ctrlray.rewards.heads import Floats, Heads, Ints
from ctrlray.rewards.job import LabelledSource, RewardEvaluateJob
from ctrlray.rewards.tfidf import TfidfHeads
from ctrlray.schema import Message, prompt_id
from ctrlray.tables import Storage

Answer = tuple[Sequence[Message], str]


@dataclass(frozen=True)
class Scored:
    """The answers of one source as numbers; of pairs chosen, rejected, chosen, rejected, ..."""

    scores: Mapping[str, Floats]
    """[N] by output, NaN where scoring failed."""
    length: Floats
    """[N], natural log of the answer's characters: a reward need not have a tokenizer."""
    prompt: Ints
    """[N], equal for the answers of one prompt."""


def evaluate(job: RewardEvaluateJob, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a reward and write <name>.json and <name>.md into the job's folder; returns the card. See `measure_sources`."""
    sources = measure_sources(job, progress)
    card = {"name": job.name, "reward": job.reward.model_dump(mode="json"), "sources": sources}
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / f"{job.name}.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (job.folder / f"{job.name}.md").write_text(card_text(card), encoding="utf-8")
    return card


def measure_sources(job: RewardEvaluateJob, progress: Progress | None = None) -> dict[str, Any]:
    """Score the labelled answers and measure, by source; null where something cannot be estimated.

    Uses the running Ray. Raises ConfigError where a source is about an output that the reward does not have, DataError where
    no answer of a source could be scored.
    """
    outputs = outputs_of(job.reward)
    labels = {s.name: _labels(s, outputs, job.max_rows) for s in job.sources}
    answers = {name: _answers(found) for name, found in labels.items()}
    scores, errors = _score([a for part in answers.values() for a in part], job, progress or Silent())
    sources, start = {}, 0
    for source in job.sources:
        here = slice(start, start + len(answers[source.name]))
        start = here.stop
        failed = Counter(e.split(":")[0] for e in errors[here] if e)
        if sum(failed.values()) == len(answers[source.name]):
            raise DataError(f"sources.{source.name}: the reward scored no answer; the first error: {errors[here][0]}")
        scored = _scored(answers[source.name], {name: values[here] for name, values in scores.items()})
        measured = measure_source(labels[source.name], scored, source.attribute, job.bins, job.seed)
        sources[source.name] = _without_nan(measured | {"path": source.path, "failed": dict(failed)})
    return sources


def outputs_of(reward: config.Reward) -> tuple[str, ...]:
    """Names of a reward's outputs, without building it."""
    if reward.outputs is not None:
        return reward.outputs
    assert isinstance(reward, config.EmbeddedReward | config.TfidfReward) and reward.heads is not None
    heads = TfidfHeads if isinstance(reward, config.TfidfReward) else Heads
    return heads.load(reward.heads).attributes


def _labels(source: LabelledSource, outputs: Sequence[str], limit: int | None) -> Labels:
    if source.attribute is not None and source.attribute not in outputs:
        raise ConfigError(f"sources.{source.name}.attribute={source.attribute!r}: the reward gives {list(outputs)}")
    found = read_labels(source.path, [source.attribute] if source.attribute else outputs)
    if found.format != "ratings" and source.attribute is None and len(outputs) > 1:
        raise ConfigError(f"sources.{source.name}: set attribute to the output that its pairs are about, one of {list(outputs)}")
    if len(found) < 2:
        raise DataError(
            f"sources.{source.name}: {len(found)} usable rows in {source.path}, at least 2 are needed; not used: {found.dropped}"
        )
    return Labels(found.format, found.pairs[:limit], found.rated[:limit], found.dropped)


def _answers(labels: Labels) -> list[Answer]:
    pairs: list[Answer] = [(p.messages, text) for p in labels.pairs for text in (p.chosen, p.rejected)]
    return pairs + [(r.messages, r.response) for r in labels.rated]


def _score(answers: Sequence[Answer], job: RewardEvaluateJob, progress: Progress) -> tuple[dict[str, Floats], list[str]]:
    from ctrlray.stages.score import score_answers

    notes = Storage(str(job.folder.resolve() / f".{job.name}.in_flight"))
    timeout = job.cluster.stall_timeout_s
    return score_answers(job.reward, answers, job.actors, job.batch_size, notes, progress, timeout)


def _scored(answers: Sequence[Answer], scores: Mapping[str, Floats]) -> Scored:
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(prompt_id(chat), len(numbers)) for chat, _ in answers]
    length = np.log([max(1, len(text)) for _, text in answers])
    return Scored(scores, length, np.array(prompts, np.int64))


def measure_source(labels: Labels, scored: Scored, attribute: str | None, bins: int, seed: int) -> dict[str, Any]:
    """All measures of one source; `attribute` may be None where the reward has one output, or the labels are ratings."""
    out: dict[str, Any] = {"format": labels.format, "rows": len(labels), "dropped": dict(labels.dropped)}
    if labels.format == "ratings":
        out["ratings"] = _against_ratings(labels, scored, seed)
    else:
        name = attribute or next(iter(scored.scores))
        out["attribute"] = name
        out |= _on_pairs(scored, name, bins)
    fine = np.all([np.isfinite(v) for v in scored.scores.values()], axis=0)
    pairs = labels.format != "ratings"
    out["length_correlation"] = {
        name: measure.correlation(values[fine], scored.length[fine], scored.prompt[fine], seed=seed, across=not pairs)
        for name, values in scored.scores.items()
    }
    out["agreement"] = {
        f"{a}~{b}": {
            "pearson": measure.correlation(u[fine], v[fine], scored.prompt[fine], seed=seed, across=True),
            "spearman": measure.spearman(u[fine], v[fine], scored.prompt[fine], seed=seed),
        }
        for i, (a, u) in enumerate(scored.scores.items())
        for j, (b, v) in enumerate(scored.scores.items())
        if i < j
    }
    return out


def _on_pairs(scored: Scored, name: str, bins: int) -> dict[str, Any]:
    margins = {other: values[0::2] - values[1::2] for other, values in scored.scores.items()}
    fine = np.isfinite(margins[name])
    rule, which = measure.length_only((scored.length[0::2] - scored.length[1::2])[fine])
    return {
        "accuracy": measure.accuracy(margins[name][fine]),
        "length_only": rule,
        "length_only_rule": which,
        "accuracy_of_others": {b: measure.accuracy(m[np.isfinite(m)]) for b, m in margins.items() if b != name},
        "calibration": measure.calibration(margins[name][fine], bins),
    }


def _against_ratings(labels: Labels, scored: Scored, seed: int) -> dict[str, Any]:
    out = {}
    for name, values in scored.scores.items():
        given = np.array([r.ratings.get(name, math.nan) for r in labels.rated])
        fine = np.isfinite(values) & np.isfinite(given)
        if fine.sum() < 2:
            continue
        score, rating, prompt = values[fine], given[fine], scored.prompt[fine]
        out[name] = {
            "rows": int(fine.sum()),
            "spearman": measure.spearman(score, rating, prompt, seed=seed),
            "mean_absolute_error": measure.mean(np.abs(score - rating), prompt, seed=seed),
            "same_for_the_mean_rating": measure.mean(np.abs(rating - rating.mean()), prompt, seed=seed),
            "length_only": measure.spearman(scored.length[fine], rating, prompt, seed=seed),
        }
    return out


def _without_nan(value: Any) -> Any:
    """The same with null for what could not be estimated: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    reward = card["reward"]
    what = reward.get("model") or reward.get("target") or reward.get("url")
    lines = [f"# Reward `{card['name']}` against human labels", "", f"The reward is `{what}` ({reward['type']})."]
    return "\n".join([*lines, *sources_text(card["sources"])]) + "\n"


def sources_text(sources: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown on every source: one table of all pairs, one of all ratings, then the details of each."""
    show, lines = measure.show, []
    pairs = {name: s for name, s in sources.items() if s["format"] != "ratings"}
    rated = {name: s for name, s in sources.items() if s["format"] == "ratings"}
    if pairs:
        lines += ["", "## Preference pairs", ""]
        lines += ["Share of pairs whose chosen answer scores higher (ties half), 95% Wilson intervals.", ""]
        lines += ["| source | output | pairs | accuracy | length alone, same rows | calibration error | log loss |"]
        lines += ["|---" * 7 + "|"]
        for name, s in pairs.items():
            curve = s["calibration"]
            lines.append(
                f"| {name} | {s['attribute']} | {s['rows']} | {show(s['accuracy'])} | {show(s['length_only'])} "
                f"({s['length_only_rule']}) | {curve['ece']:.3f} | {curve['log_loss']:.3f} |"
            )
    if rated:
        lines += ["", "## Ratings", ""]
        lines += ["Rank correlation with the ratings and mean absolute error, 95% bootstrap intervals. Errors"]
        lines += ["count where scores are in the ratings' units; that of the mean rating is what knowing nothing costs.", ""]
        lines += ["| source | output | rows | Spearman | length alone | error | error of the mean rating |"]
        lines += ["|---" * 7 + "|"]
        for name, s in rated.items():
            lines += [
                f"| {name} | {attribute} | {m['rows']} | {show(m['spearman'])} | {show(m['length_only'])} "
                f"| {show(m['mean_absolute_error'])} | {show(m['same_for_the_mean_rating'])} |"
                for attribute, m in s["ratings"].items()
            ]
    for name, s in sources.items():
        lines += _source_text(name, s)
    return lines


def _source_text(name: str, s: Mapping[str, Any]) -> list[str]:
    show = measure.show
    lines = ["", f"## {name}", ""]
    left_out = {**s["dropped"], **s["failed"]}
    lines.append("Rows not used: " + (", ".join(f"{n} {reason}" for reason, n in left_out.items() if n) or "none") + ".")
    if "calibration" in s:
        lines += ["", "Calibration: how often the favoured answer won, beside the probability it was given.", ""]
        lines += ["| given | pairs | mean given | won |", "|---|---|---|---|"]
        lines += [
            f"| {b['low']:.2f} to {b['high']:.2f} | {b['count']} | {b['predicted']:.3f} | {show(b['observed'])} |"
            for b in s["calibration"]["bins"]
        ]
    where = "over all answers" if s["format"] == "ratings" else "within a prompt"
    lines += ["", "Correlations of all scored answers, 95% bootstrap intervals over prompts; lengths are in characters.", ""]
    lines += ["| what | r |", "|---|---|"]
    lines += [f"| {output} with log length, {where} | {show(r)} |" for output, r in s["length_correlation"].items()]
    for pair, r in s["agreement"].items():
        lines.append(f"| {pair.replace('~', ' with ')}, Pearson | {show(r['pearson'])} |")
        lines.append(f"| {pair.replace('~', ' with ')}, Spearman | {show(r['spearman'])} |")
    if others := s.get("accuracy_of_others"):
        lines += ["", "Accuracy of the other outputs on these pairs: "]
        lines[-1] += ", ".join(f"{other} {show(a)}" for other, a in others.items()) + "."
    return lines
