"""Evaluate stage: every method on the same held-out prompts and the same grid of settings, then the scores of its answers.

One engine start serves all methods: their weights are swapped in place, because all start from one prepared base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data

from ctrlray import config, schema
from ctrlray.clock import note_start, start_seconds
from ctrlray.control import ControlSpace, Levels, Renderer, nearest_first, with_system
from ctrlray.distill import Levels as LevelScale
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.engine.pool import EnginePool
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress, StageResult, count
from ctrlray.metrics.compare import compare_grid
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.stages.export import START
from ctrlray.stages.generate import consume
from ctrlray.stages.score import job_attributes, patience_of, score_stream
from ctrlray.tables import Storage, from_rows, slices

RERANKING = "reranking"
UNCONTROLLED = (START, RERANKING)
"""Methods whose answers do not depend on the setting; reranking chooses among them afterwards."""


class Question(NamedTuple):
    """One answer to be sampled for the grid."""

    grid_id: str
    prompt_id: str
    method: str
    levels: Levels
    sample: int
    token_ids: list[int]


def questions(
    method: str,
    prompts: Sequence[Mapping[str, Any]],
    cells: Sequence[Levels],
    samples: int,
    space: ControlSpace,
    renderer: Renderer,
) -> list[Question]:
    """All questions of one method. The start model knows no setting, so it is not asked once for each."""
    asked = cells[:1] if method in UNCONTROLLED else cells
    return [
        Question(
            schema.digest(p["prompt_id"], method, list(cell), sample),
            p["prompt_id"],
            method,
            cell,
            sample,
            _render(method, p["messages"], cell, space, renderer),
        )
        for p in prompts
        for cell in asked
        for sample in range(samples)
    ]


def _render(method: str, messages: Sequence[schema.Message], cell: Levels, space: ControlSpace, renderer: Renderer) -> list[int]:
    if method in UNCONTROLLED:
        return renderer.render(messages)
    if method == "prompting":
        return renderer.render(with_system(messages, space.instruction(cell)))
    return renderer.render(messages, cell)


def run(
    prompts: pa.Table,
    job: config.Job,
    spec: EngineSpec,
    renderer: Renderer,
    weights: Callable[[str], str | None],
    scales: Mapping[str, LevelScale],
    out: Storage,
    progress: Progress,
) -> StageResult:
    """Answer the grid with every method that `out` lacks, score it, compute the metrics.

    `weights(method)` is the model folder of a trained method, None for those that run on the prepared base.
    """
    space = ControlSpace.of(job.control)
    cells = space.cells(job.evaluate.levels)
    rows = sorted(prompts.to_pylist(), key=lambda p: p["prompt_id"])
    methods: list[str] = [*job.evaluate.methods, *(o.type for o in job.train.objectives)]
    plan = {m: questions(m, rows, cells, _samples(m, job), space, renderer) for m in methods}
    progress.total(sum(map(len, plan.values())))
    _answer(plan, job, spec, weights, out, progress)
    answers = out.read_table("answers", _answers_schema(job)).to_pylist()
    _score(answers, rows, job, out, progress)
    grid, failed = _grid(answers, job, cells, scales, out)
    out.write_table(grid, "grid")
    out.write_json(evaluate_grid(grid, job.control, job.evaluate.bootstrap, job.seed), "metrics.json")
    out.write_json(compare_grid(grid, job.control, job.evaluate.bootstrap, job.seed), "comparisons.json")
    spent = {m: sum(a["num_tokens"] for a in answers if a["method"] == m) for m in methods}
    done = len(answers) - sum(failed.values())
    facts = {"tokens_spent": spent, "start_s": round(start_seconds(out), 1)}
    return StageResult(len(answers), done, quarantined=failed, tokens=sum(spent.values()), facts=facts)


def _samples(method: str, job: config.Job) -> int:
    """Answers that a method gives to a prompt and setting; reranking's candidates serve all settings."""
    return job.evaluate.candidates if method == RERANKING else job.evaluate.samples


def _answers_schema(job: config.Job) -> pa.Schema:
    """The grid before its scores."""
    full = schema.grid(job_attributes(job))
    return pa.schema([f for f in full if not f.name.startswith(("score_", "units_"))], metadata=full.metadata)


def _answer(
    plan: Mapping[str, Sequence[Question]],
    job: config.Job,
    spec: EngineSpec,
    weights: Callable[[str], str | None],
    out: Storage,
    progress: Progress,
) -> None:
    written = out.names("answers", suffix=".parquet")
    missing = [m for m in plan if f"method-{m}.parquet" not in written]
    for method in plan.keys() - missing:
        progress.advance(len(plan[method]))
    if not missing:
        return
    progress.note("starting vLLM")
    began = time.monotonic()
    with EnginePool(spec, job.generate.pool, f"{job.name}-evaluate", job.cluster.stall_timeout_s) as pool:
        note_start(out, time.monotonic() - began)
        for method in missing:
            folder = weights(method)
            if folder is not None:
                pool.load_weights(folder)
            progress.note(method)
            asked = plan[method]
            sampling = job.generate.sampling if method == RERANKING else job.evaluate.sampling
            found = pool.generate([q.token_ids for q in asked], sampling, job.evaluate.batch_size, progress.advance)
            rows = [_row(q, c or _NO_ANSWER, pool.weights_version, job) for q, c in zip(asked, found, strict=True)]
            if bad := [_left_out(q) for q, c in zip(asked, found, strict=True) if c is None]:
                out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine", f"method-{method}")
            out.write_table(from_rows(rows, _answers_schema(job)), "answers", f"method-{method}")


_NO_ANSWER = Completion("", [], 0.0, DIED, [])


def _left_out(question: Question) -> dict[str, str]:
    detail = f"alone with prompt {question.prompt_id} under {question.method} {list(question.levels)} an engine ended"
    return {"stage": "evaluate", "row_id": question.grid_id, "error": DIED, "detail": detail}


def _row(question: Question, answer: Completion, version: int, job: config.Job) -> dict[str, Any]:
    requested = dict(zip((f"requested_{n}" for n in job_attributes(job)), question.levels, strict=True))
    return requested | {
        "grid_id": question.grid_id,
        "prompt_id": question.prompt_id,
        "method": question.method,
        "sample": question.sample,
        "text": answer.text.strip(),
        "num_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "weights_version": version,
    }


def _score(
    answers: Sequence[dict[str, Any]], prompts: Sequence[dict[str, Any]], job: config.Job, out: Storage, progress: Progress
) -> None:
    """Score each distinct (prompt, text) once."""
    names = job_attributes(job)
    done = set(out.read_table("scores", schema.scores(names), ["response_id"])["response_id"].to_pylist())
    todo = {_text_id(a): a for a in answers if a["finish_reason"] != DIED and _text_id(a) not in done}
    if not todo:
        return
    progress.note("scoring")
    table = pa.table(
        {
            "response_id": list(todo),
            "prompt_id": [a["prompt_id"] for a in todo.values()],
            "text": [a["text"] for a in todo.values()],
        }
    )
    conversations = {p["prompt_id"]: p["messages"] for p in prompts}
    stream = score_stream(ray.data.from_arrow(slices(table, job.score.batch_size)), job, conversations, out)
    consume(stream, _Muted(progress), patience_of("evaluate", job, out))


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


def _text_id(answer: Mapping[str, Any]) -> str:
    return schema.digest(answer["prompt_id"], answer["text"])


def _grid(
    answers: Sequence[dict[str, Any]],
    job: config.Job,
    cells: Sequence[Levels],
    scales: Mapping[str, LevelScale],
    out: Storage,
) -> tuple[pa.Table, dict[str, int]]:
    """The scored grid, and how many answers have no score, by reason; NaN stands for theirs.

    The start model's answers stand in every cell, reranking's best one for the cell.
    """
    names = job_attributes(job)
    scored = {r["response_id"]: r for r in out.read_table("scores", schema.scores(names)).to_pylist()}
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    candidates: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        died = answer["finish_reason"] == DIED
        found = None if died else scored.get(_text_id(answer))
        if found is None:
            failed.append(DIED if died else "score")
        for name in names:
            value = float("nan") if found is None else found[f"score_{name}"]
            units = float("nan") if found is None else float(scales[name].units(np.array([value]))[0])
            answer |= {f"score_{name}": value, f"units_{name}": units}
        if answer["method"] == RERANKING:
            candidates.setdefault(answer["prompt_id"], []).append(answer)
        else:
            rows += [_placed(answer, cell, names) for cell in cells] if answer["method"] == START else [answer]
    for found in candidates.values():
        rows += [_placed(_nearest(found, cell, names), cell, names) | {"sample": 0} for cell in cells]
    return from_rows(sorted(rows, key=lambda r: r["grid_id"]), schema.grid(names)), count(failed)


def _placed(answer: Mapping[str, Any], cell: Levels, names: Sequence[str]) -> dict[str, Any]:
    """An answer that knows no setting, as the answer to one."""
    asked = {f"requested_{n}": level for n, level in zip(names, cell, strict=True)}
    return {**answer, **asked, "grid_id": schema.digest(answer["grid_id"], list(cell))}


def _nearest(candidates: Sequence[dict[str, Any]], cell: Levels, names: Sequence[str]) -> dict[str, Any]:
    """The candidate nearest to the requested levels; the first sample of equals, a failed one last."""
    ordered = sorted(candidates, key=lambda answer: int(answer["sample"]))
    return ordered[nearest_first([[answer[f"units_{n}"] for n in names] for answer in ordered], cell)[0]]
