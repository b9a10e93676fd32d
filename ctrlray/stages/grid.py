"""The evaluation's grid out of answers and their scores, by the training rewards and by the judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data

from ctrlray import config, schema
from ctrlray.control import Levels, nearest_first
from ctrlray.distill import Levels as LevelScale
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress, count
from ctrlray.stages.export import START
from ctrlray.stages.generate import consume
from ctrlray.stages.questions import RERANKING
from ctrlray.stages.score import Conversations, job_attributes, patience_of, score_stream
from ctrlray.tables import Storage, from_rows, slices

NO_SCORE = "score"
"""The reason where a reward gave no score and the quarantine has none."""
Texts = Mapping[str, tuple[str, str]]
"""Prompt id and answer of each distinct pair of them, by `text_id`."""


class Scored(NamedTuple):
    """Scores of distinct texts, with the scales that turn them into level units."""

    scores: Mapping[str, Mapping[str, float]]
    """By `text_id`, then by attribute."""
    scales: Mapping[str, LevelScale]
    errors: Mapping[str, str] = MappingProxyType({})
    """Why a text has no scores, by `text_id`."""

    def units(self, name: str, text_ids: Sequence[str]) -> Any:
        """Level units of some texts, float64 [N], NaN where a text has no score."""
        values = np.array([self.scores[t][name] if t in self.scores else math.nan for t in text_ids], np.float64)
        known = np.isfinite(values)
        values[known] = self.scales[name].units(values[known])
        return values


def text_id(prompt_id: str, text: str) -> str:
    """Identity of an answer's text to a prompt, whoever gave it."""
    return schema.digest(prompt_id, text)


def texts_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """The distinct texts of answers, those left out whose engine died."""
    alive = (a for a in answers if a["finish_reason"] != DIED)
    return {text_id(a["prompt_id"], a["text"]): (a["prompt_id"], a["text"]) for a in alive}


def score_texts(
    texts: Texts,
    chats: Conversations,
    rewards: Sequence[config.Reward],
    job: config.Job,
    out: Storage,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Score the texts that `out` has no scores of, each once; the scores of all that have some, by attribute."""
    names = job_attributes(job)
    done = set(out.read_table("scores", schema.scores(names), ["response_id"])["response_id"].to_pylist())
    todo = {key: pair for key, pair in texts.items() if key not in done}
    if todo:
        progress.note("scoring" if rewards == job.teachers else "judging")
        prompts, answers = zip(*todo.values(), strict=True)
        table = pa.table({"response_id": list(todo), "prompt_id": prompts, "text": answers})
        stream = score_stream(ray.data.from_arrow(slices(table, job.score.batch_size)), job, rewards, chats, out)
        consume(stream, _Muted(progress), patience_of("evaluate", job, rewards, out))
    rows = out.read_table("scores", schema.scores(names)).to_pylist()
    return {r["response_id"]: {n: r[f"score_{n}"] for n in names} for r in rows if r["response_id"] in texts}


def errors(out: Storage) -> dict[str, str]:
    """Why texts of `score_texts` have no scores, by `text_id`."""
    bad = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    return {r["row_id"]: r["error"] for r in bad if r["stage"] == "score"}


class _Muted:
    """Scoring's rows are not the grid's: only the notes pass."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def total(self, rows: int) -> None:
        """Ignore."""

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Ignore."""

    def measure(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Pass on."""
        self._progress.note(text or "scoring")


def build(
    answers: Sequence[dict[str, Any]], job: config.Job, cells: Sequence[Levels], scored: Scored, judged: Scored | None
) -> tuple[pa.Table, dict[str, int]]:
    """The scored grid, and how many answers have no score by the training rewards, by reason; NaN stands for theirs.

    The start model's answers stand in every cell, reranking's best one for the cell, chosen by the training rewards.
    """
    names = job_attributes(job)
    ids = [text_id(a["prompt_id"], a["text"]) for a in answers]
    alive = [a["finish_reason"] != DIED for a in answers]
    without = [(a, key) for a, key in zip(alive, ids, strict=True) if not a or key not in scored.scores]
    failed = count([scored.errors.get(key, NO_SCORE) if a else DIED for a, key in without])
    known = [key if a else "" for a, key in zip(alive, ids, strict=True)]  # a lost answer's text is nobody's
    rows = [dict(a) for a in answers]
    for prefix, found in (("", scored), ("judge_", judged)):
        for name in names if found else ():
            assert found is not None
            for row, key, units in zip(rows, known, found.units(name, known), strict=True):
                row[f"{prefix}score_{name}"] = found.scores.get(key, {}).get(name, math.nan)
                row[f"{prefix}units_{name}"] = float(units)
    placed = _in_cells(rows, cells, names)
    return from_rows(sorted(placed, key=lambda r: r["grid_id"]), schema.grid(names, judged=judged is not None)), failed


def num_scored(grid: pa.Table, answers: Sequence[Mapping[str, Any]], job: config.Job, first: Levels, scored: Scored) -> int:
    """How many answers stand in the grid with scores by the training rewards.

    Answers of the start model stand in every cell and count in `first`. Of reranking's candidates the grid has the best alone,
    so they count as they are.
    """
    names = job_attributes(job)
    done = 0
    for row in grid.to_pylist():
        in_first = all(row[f"requested_{n}"] == level for n, level in zip(names, first, strict=True))
        counts = in_first if row["method"] == START else row["method"] != RERANKING
        done += counts and all(math.isfinite(row[f"score_{n}"]) for n in names)
    candidates = [a for a in answers if a["method"] == RERANKING and a["finish_reason"] != DIED]
    return done + sum(text_id(a["prompt_id"], a["text"]) in scored.scores for a in candidates)


def _in_cells(answers: Sequence[dict[str, Any]], cells: Sequence[Levels], names: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    candidates: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        if answer["method"] == RERANKING:
            candidates.setdefault(answer["prompt_id"], []).append(answer)
        else:
            rows += [_placed(answer, cell, names) for cell in cells] if answer["method"] == START else [answer]
    for found in candidates.values():
        rows += [_placed(_nearest(found, cell, names), cell, names) | {"sample": 0} for cell in cells]
    return rows


def _placed(answer: Mapping[str, Any], cell: Levels, names: Sequence[str]) -> dict[str, Any]:
    """An answer that knows no setting, as the answer to one."""
    asked = {f"requested_{n}": level for n, level in zip(names, cell, strict=True)}
    return {**answer, **asked, "grid_id": schema.digest(answer["grid_id"], list(cell))}


def _nearest(candidates: Sequence[dict[str, Any]], cell: Levels, names: Sequence[str]) -> dict[str, Any]:
    """The candidate nearest to the requested levels; the first sample of equals, a failed one last."""
    ordered = sorted(candidates, key=lambda answer: int(answer["sample"]))
    return ordered[nearest_first([[answer[f"units_{n}"] for n in names] for answer in ordered], cell)[0]]
