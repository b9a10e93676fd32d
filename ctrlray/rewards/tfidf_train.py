"""Making tfidf heads: preference pairs in, a joint fit of sparse n-grams, heads with a card out. No network, no Ray.

    pairs ─► Vocabulary of the training answers ─► fit ─► <name>.safetensors
                                                    └─► measures on held-out rows ─► <name>.json, <name>.md

The fit runs to the optimum and its weights are rounded to coarse steps, so the same labels give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize

from ctrlray.errors import ConfigError
from ctrlray.hh import Pair
from ctrlray.rewards import measure
from ctrlray.rewards.data import preference_pairs, read_parts
from ctrlray.rewards.heads import Answers, Floats, Objective, Penalties, Preferences
from ctrlray.rewards.job import LinearTfidf, NGramFit, RewardTrainJob
from ctrlray.rewards.tfidf import TfidfHeads, Vocabulary
from ctrlray.schema import digest, first_human_turn, prompt_id

Parts = Mapping[str, Sequence[Pair]]


def train_tfidf(job: RewardTrainJob) -> dict[str, Any]:
    """Make heads and card as `job` says. Writes <name>.safetensors, .json and .md into `job.folder`; returns the card."""
    method = job.method
    if not isinstance(method, LinearTfidf):
        raise ConfigError(f"method.type={method.type!r}: `train_tfidf` needs method.type=tfidf")
    labels = read_parts(job)
    pairs = preference_pairs(labels)
    names = [a.name for a in job.attributes]
    heads, measured = _made(pairs, names, method.fit, method.folds)
    trials = {name: (f, _made(pairs, names, f, method.folds)[1]) for name, f in method.trials.items()}
    card = {
        "name": job.name,
        "data": {
            "pairs": {part: len(ps) for part, ps in pairs.items()},
            "dropped": {part: dict(found.dropped) for part, found in labels.items()},
            "judge": job.judge,
            "judge_half_reserved": job.reserve_judge_half,
        },
        "fit": method.fit.model_dump(mode="json"),
        "ngrams": len(heads.vocabulary.hashes),
        "folds": method.folds,
        "measured": measured,
        "trials": {name: {"fit": f.model_dump(mode="json"), "measured": m} for name, (f, m) in trials.items()},
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    heads.save(job.folder / f"{job.name}.safetensors")
    (job.folder / f"{job.name}.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (job.folder / f"{job.name}.md").write_text(card_text(card), encoding="utf-8")
    return card


def _made(pairs: Parts, names: Sequence[str], fit: NGramFit, folds: int) -> tuple[TfidfHeads, dict[str, Any]]:
    """Heads by one setting and everything that is measured of them."""
    training = [p for n in names for p in pairs[f"train/{n}"]]
    vocabulary = Vocabulary.of([t for p in training for t in (p.chosen, p.rejected)], fit.words, fit.chars, fit.min_count)
    if not len(vocabulary.hashes):
        raise ConfigError(f"method.fit.min_count={fit.min_count}: no n-gram stands in so many training answers; lower it")
    train, valid = ({n: _preferences(pairs[f"{split}/{n}"], vocabulary) for n in names} for split in ("train", "valid"))
    heads = fit_tfidf(train, vocabulary, fit.penalties)
    held_out = [p for n in names for p in pairs[f"valid/{n}"]]
    measured = measure.report(heads, train, valid, _answers(held_out, vocabulary), seed=0)
    parts = {n: np.array([_fold(p, folds) for p in pairs[f"train/{n}"]]) for n in names}
    margins = {n: np.zeros(len(parts[n])) for n in names}
    for k in range(folds):
        others = fit_tfidf({n: _take(train[n], parts[n] != k) for n in names}, vocabulary, fit.penalties)
        for i, n in enumerate(names):
            margins[n][parts[n] == k] = measure.margin(others, _take(train[n], parts[n] == k))[:, i]
    for n in names:
        measured["attributes"][n]["cross_validated"] = measure.accuracy(margins[n])
    return heads, measured


def fit_tfidf(preferences: Mapping[str, Preferences], vocabulary: Vocabulary, penalties: Penalties) -> TfidfHeads:
    """One head per attribute, all at once, by L-BFGS on `ctrlray.rewards.heads.Objective` without a pool of answers.

    `chosen` and `rejected` of the preferences are sparse rows [P, V] of the vocabulary's vectors.
    """
    gaps: list[Any] = [p.chosen - p.rejected for p in preferences.values()]
    nothing: Floats = np.zeros((0, len(vocabulary.hashes)))
    objective = Objective(gaps, [p.length_gap for p in preferences.values()], nothing, np.zeros(0), penalties)
    # All zeros is a corner of the penalties' cosines, so start from the mean difference of each attribute's pairs, kept small.
    start = np.stack([np.asarray(g.mean(axis=0)).ravel() for g in gaps])
    start *= 0.1 / np.maximum(np.linalg.norm(start, axis=1, keepdims=True), 1e-12)
    exact = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": 1e-9}
    weights = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=exact).x.reshape(len(gaps), -1)
    both: Any = [x for p in preferences.values() for x in (p.chosen, p.rejected)]
    centre = np.concatenate([np.asarray(x.mean(axis=0)) for x in both])
    sizes = np.array([x.shape[0] for x in both], np.float64)
    return TfidfHeads.of(list(preferences), vocabulary, weights, (sizes @ centre / sizes.sum())[None])


def _preferences(pairs: Sequence[Pair], vocabulary: Vocabulary) -> Preferences:
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    return Preferences(vocabulary.vectors(chosen), vocabulary.vectors(rejected), _log_lengths(chosen) - _log_lengths(rejected))


def _take(preferences: Preferences, rows: Any) -> Preferences:
    return Preferences(preferences.chosen[rows], preferences.rejected[rows], preferences.length_gap[rows])


def _answers(pairs: Sequence[Pair], vocabulary: Vocabulary) -> Answers:
    """Both answers of every pair, for correlations within a prompt."""
    texts = [t for p in pairs for t in (p.chosen, p.rejected)]
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(prompt_id(p.messages), len(numbers)) for p in pairs for _ in range(2)]
    return Answers(vocabulary.vectors(texts), np.array(prompts, np.int64), _log_lengths(texts))


def _log_lengths(texts: Sequence[str]) -> Floats:
    """Natural logs of characters: there is no tokenizer here."""
    return np.log([max(1, len(t)) for t in texts])


def _fold(pair: Pair, folds: int) -> int:
    return int(digest("fold", first_human_turn(pair.messages)), 16) % folds


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    measured, data, show = card["measured"], card["data"], measure.show
    names = list(measured["attributes"])
    lines = [
        f"# TF-IDF heads `{card['name']}`",
        "",
        f"Linear heads on TF-IDF n-grams of an answer's text ({card['ngrams']} n-grams, kept as 32-bit hashes), which score",
        f"{', '.join(names)}. Higher is more. They read the answer alone and no network is behind them: a second",
        "opinion of another kind on a dial; weak for a single answer, and not to decide what may be shown to people.",
        "",
        "## Data",
        "Preference pairs, by part: " + "; ".join(f"{part} {n}" for part, n in data["pairs"].items()) + ".",
        measure.half_text(data),
        "",
        "## Measured",
        "Held-out pairs, with 95% intervals (Wilson). Lengths are in characters.",
        "",
        "| head | own pairs | length alone, same rows | " + " | ".join(f"on {b} pairs" for b in names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for name, m in measured["attributes"].items():
        cross = [show(m["accuracy_on_others"][b]) if b != name else "(own)" for b in names]
        lines.append(
            f"| {name} | {show(m['accuracy'])} | {show(m['length_only'])} ({m['length_only_rule']}) | {' | '.join(cross)} |"
        )
    lines += ["", "Correlations within a prompt, over the answers of the held-out pairs (bootstrap over prompts).", ""]
    lines += ["| what | r |", "|---|---|"]
    lines += [f"| {pair.replace('~', ' with ')} | {show(r)} |" for pair, r in measured.get("correlations", {}).items()]
    lines += [f"| {n} with log length | {show(m['length_correlation'])} |" for n, m in measured["attributes"].items()]
    lines += ["", "## What was tried", f"Cross-validated: on training pairs, {card['folds']} parts by first human turn.", ""]
    return "\n".join([*lines, *_trials(card)]) + "\n"


def _trials(card: Mapping[str, Any]) -> list[str]:
    names = list(card["measured"]["attributes"])
    head = ["setting", "words", "chars", "at least in", "l2", "cross", "pair_length"]
    head += [f"{n} cross-validated" for n in names] + [f"{n} held out" for n in names] + [f"r {n}, length" for n in names]
    lines = ["| " + " | ".join([*head, "r between"]) + " |", "|---" * (len(head) + 1) + "|"]
    chosen = {"chosen": {"fit": card["fit"], "measured": card["measured"]}}
    for name, trial in {**chosen, **card["trials"]}.items():
        fit, found = trial["fit"], trial["measured"]
        m = [found["attributes"][n] for n in names]
        cells = [name, *(", ".join(map(str, fit[k])) or "none" for k in ("words", "chars")), str(fit["min_count"])]
        cells += [f"{fit[k]:g}" for k in ("l2", "cross", "pair_length")]
        cells += [f"{x['cross_validated'][0]:.3f}" for x in m] + [f"{x['accuracy'][0]:.3f}" for x in m]
        cells += [f"{x.get('length_correlation', [math.nan])[0]:+.2f}" for x in m]
        cells.append(", ".join(f"{r[0]:+.2f}" for r in found.get("correlations", {}).values()) or "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines
