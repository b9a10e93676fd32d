"""What the evaluation asks of each method, and the engines' answers: one start of the engines serves all methods and sets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from ctrlray import config, schema
from ctrlray.clock import Lap, note_start
from ctrlray.control import ControlSpace, Levels, Renderer, with_system
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.engine.pool import EnginePool
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress
from ctrlray.stages.export import START
from ctrlray.stages.score import job_attributes
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import current, warn_quarantined

RERANKING = "reranking"
UNCONTROLLED = (START, RERANKING)
"""Methods whose answers do not depend on the setting; reranking chooses among them afterwards."""
DRIFT, PIECES, ENGINES = "drift", "pieces", "engines"
_NO_ANSWER = Completion("", [], 0.0, DIED, [])


class Question(NamedTuple):
    """One answer to be sampled for the grid."""

    grid_id: str
    prompt_id: str
    method: str
    levels: Levels
    sample: int
    token_ids: list[int]


class Plan(NamedTuple):
    """All questions of one set of prompts by method, and where their answers go."""

    questions: Mapping[str, Sequence[Question]]
    out: Storage
    plain: Mapping[str, list[int]] = {}
    """The prompts without any setting, by prompt_id, where answers of trained methods are held against the base; else empty."""
    refused: Mapping[str, int] = {}
    """Questions that are not asked, by the error of their prompt."""


def methods(job: config.Job) -> list[str]:
    """All methods of a job: its baselines, then its trained objectives."""
    return [*job.evaluate.methods, *(o.type for o in job.train.objectives)]


def samples(method: str, job: config.Job) -> int:
    """Answers that a method gives to a prompt and setting; reranking's candidates serve all settings."""
    return job.evaluate.candidates if method == RERANKING else job.evaluate.samples


def sampling(method: str, job: config.Job) -> config.Sampling:
    """How a method's answers are sampled; reranking chooses among answers like those that scoring saw."""
    return job.generate.sampling if method == RERANKING else job.evaluate.sampling


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
            render(method, p["messages"], cell, space, renderer),
        )
        for p in prompts
        for cell in asked
        for sample in range(samples)
    ]


def render(method: str, messages: Sequence[schema.Message], cell: Levels, space: ControlSpace, renderer: Renderer) -> list[int]:
    """The tokens of a conversation as a method is asked it."""
    if method in UNCONTROLLED:
        return renderer.render(messages)
    if method == "prompting":
        return renderer.render(with_system(messages, space.instruction(cell)))
    return renderer.render(messages, cell)


def too_long(questions: Mapping[str, Sequence[Question]], job: config.Job) -> dict[str, str]:
    """Why prompts cannot be asked, by prompt_id: with one of their questions, by method, no answer fits into the context."""
    longest: dict[str, tuple[int, str]] = {}
    for method, asked in questions.items():
        room = sampling(method, job).max_tokens
        for q in asked:
            longest[q.prompt_id] = max(longest.get(q.prompt_id, (0, "")), (len(q.token_ids) + room, method))
    return {
        prompt: f"{size} tokens with an answer, as {method} is asked it, exceed model.max_context={job.model.max_context}"
        for prompt, (size, method) in longest.items()
        if size > job.model.max_context
    }


def answers_schema(job: config.Job) -> pa.Schema:
    """The grid before its scores, with the sampled tokens and their log-prob in nats by the weights that sampled them."""
    full = schema.grid(job_attributes(job))
    sampled = [pa.field("token_ids", schema.TOKENS), pa.field("logp", pa.float64())]
    return pa.schema([*(f for f in full if not f.name.startswith(("score_", "units_"))), *sampled], metadata=full.metadata)


def answer(
    plans: Sequence[Plan],
    job: config.Job,
    spec: EngineSpec,
    weights: Callable[[str], str | None],
    out: Storage,
    progress: Progress,
) -> None:
    """Write the `answers` that are missing, a part for each method, method after method over all plans, then the `drift`.

    `weights(method)` is the model folder of a trained method, None for those that run on the prepared base. `out` keeps how
    long the engines took to start.
    """
    missing: dict[str, list[Plan]] = {}
    for plan in plans:
        written = plan.out.names("answers", suffix=".parquet")
        for method, asked in plan.questions.items():
            if f"method-{method}.parquet" in written:
                progress.advance(len(asked))
            else:
                missing.setdefault(method, []).append(plan)
    drifts = [(plan, o.type) for plan in plans if plan.plain for o in job.train.objectives if not _drifted(plan, o.type)]
    if not missing and not drifts:
        return
    progress.note("starting vLLM")
    began, held = time.monotonic(), Lap(out, ENGINES)
    with EnginePool(spec, job.generate.pool, f"{job.name}-evaluate", job.cluster.stall_timeout_s) as pool:
        note_start(out, time.monotonic() - began)
        for method in (m for m in methods(job) if m in missing):
            folder = weights(method)
            if folder is not None:
                pool.load_weights(folder)
            progress.note(method)
            for plan in missing[method]:
                _ask(method, plan, pool, job, progress, held)
        if drifts and pool.weights_version:
            pool.load_weights(spec.model)
        for plan, method in drifts:
            progress.note(f"log-probs of {method}'s answers under the base")
            lap = Lap(plan.out, DRIFT)
            _compare(method, plan, pool, job)
            lap.keep()
            held.keep()


def _ask(method: str, plan: Plan, pool: EnginePool, job: config.Job, progress: Progress, held: Lap) -> None:
    """Write a method's answers. Each batch is kept as it comes; the next attempt asks only what was not answered."""
    asked, pieces = plan.questions[method], plan.out.sub(PIECES)
    kept = {row["grid_id"]: row for row in pieces.read_table(method, answers_schema(job)).to_pylist()}
    open_ = [q for q in asked if q.grid_id not in kept]
    progress.advance(len(asked) - len(open_))
    lap, version = Lap(plan.out, method), _version(method, job)

    def keep(places: list[int], made: list[Completion]) -> None:
        rows = [_row(open_[i], answer, version, job) for i, answer in zip(places, made, strict=True)]
        pieces.write_table(from_rows(rows, answers_schema(job)), method, f"part-{schema.digest(rows[0]['grid_id'])}")
        lap.keep()
        held.keep()
        kept.update((row["grid_id"], row) for row in rows)
        progress.advance(len(rows), sum(row["num_tokens"] for row in rows))

    pool.generate([q.token_ids for q in open_], sampling(method, job), job.evaluate.batch_size, keep)
    lap.keep()
    held.keep()
    if bad := [_left_out(q) for q in asked if q.grid_id not in kept]:
        plan.out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine", f"method-{method}")
        warn_quarantined(current(), bad)
    rows = [kept.get(q.grid_id) or _row(q, _NO_ANSWER, version, job) for q in asked]
    plan.out.write_table(from_rows(rows, answers_schema(job)), "answers", f"method-{method}")
    if pieces.exists(method):
        pieces.delete(method)


def _version(method: str, job: config.Job) -> int:
    """Of the weights that answer: 0 is the base's, then each objective's in turn; a rerun loads fewer, and counts the same."""
    trained = [o.type for o in job.train.objectives]
    return trained.index(method) + 1 if method in trained else 0


def _drifted(plan: Plan, method: str) -> bool:
    return f"method-{method}.parquet" in plan.out.names(DRIFT)


def _compare(method: str, plan: Plan, pool: EnginePool, job: config.Job) -> None:
    """Write a method's `drift`; the base's weights are in force."""
    answers = plan.out.read_part("answers", f"method-{method}", answers_schema(job)).to_pylist()
    # an earlier attempt may have asked prompts that are not asked any more
    spoken = [a for a in answers if a["token_ids"] and a["prompt_id"] in plan.plain]
    contexts = [plan.plain[a["prompt_id"]] for a in spoken]
    found = pool.logp(contexts, [a["token_ids"] for a in spoken], job.evaluate.batch_size)
    rows = [{**a, "base_logp": base} for a, base in zip(spoken, found, strict=True) if base is not None]
    plan.out.write_table(from_rows(rows, schema.drift()), DRIFT, f"method-{method}")


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
        # not the end-of-turn token of an answer that was cut back: it was not sampled
        "token_ids": answer.token_ids[: len(answer.logprobs)],
        "logp": math.fsum(answer.logprobs),
    }
