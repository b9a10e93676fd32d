"""Evaluate stage: every method on the same held-out prompts and the same grid of settings, then what its answers score.

    own prompts ─┐                            ┌─► training rewards ─┐
    sets ────────┴─► questions ─► engines ────┤                     ├─► grid, metrics.json, judge.json, refusals.json,
    pool, PPO's rollouts ─────────────────────┴─► judges ───────────┘   hacking.json, metrics-<set>.json

One engine start serves all methods and sets: weights are swapped in place, because all methods start from one prepared base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from ctrlray import config, schema
from ctrlray.clock import lap_seconds, start_seconds
from ctrlray.control import ControlSpace, Levels, Renderer
from ctrlray.distill import Levels as LevelScale
from ctrlray.engine.engine import EngineSpec
from ctrlray.errors import DataError
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress, StageResult
from ctrlray.metrics.compare import compare_grid
from ctrlray.metrics.drift import kl_by_method
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.metrics.refusals import refusal_rates
from ctrlray.metrics.texts import is_refusal
from ctrlray.stages import grid, hacking, judging, sets
from ctrlray.stages.questions import (
    DRIFT,
    ENGINES,
    RERANKING,
    Plan,
    answer,
    answers_schema,
    methods,
    questions,
    render,
    samples,
    sampling,
    too_long,
)
from ctrlray.stages.sets import TOO_LONG, Asked
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import current, warn_quarantined

Answers = list[dict[str, Any]]


class Inputs(NamedTuple):
    """What the stage reads of the run."""

    prompts: pa.Table
    """Both splits."""
    scales: Mapping[str, LevelScale]
    """Of the training rewards."""
    pool: Callable[[], pa.Table]
    """The scored answers as distillation reads them; only judges ask for it."""
    trained: Storage
    """The train stage's output: where PPO kept its rollouts."""

    def split(self, name: str) -> list[dict[str, Any]]:
        """Prompts of one split, by prompt_id."""
        return sorted((p for p in self.prompts.to_pylist() if p["split"] == name), key=lambda p: str(p["prompt_id"]))


def run(
    given: Inputs,
    job: config.Job,
    spec: EngineSpec,
    renderer: Renderer,
    weights: Callable[[str], str | None],
    out: Storage,
    progress: Progress,
) -> StageResult:
    """Answer the grid with every method that `out` lacks, score it, compute the metrics; the same for every set.

    Rows are questions, those of sets among them: as many come in as were planned, those go out whose answers are scored.
    `weights(method)` is the model folder of a trained method, None for those that run on the prepared base.
    """
    space = ControlSpace.of(job.control)
    cells = space.cells(job.evaluate.levels)
    wanted = [Asked("", given.split("eval"), out), *_sets(given, job, cells, space, renderer, out)]
    asked, plans = zip(*(_planned(part, job, cells, space, renderer) for part in wanted), strict=True)
    progress.total(sum(map(_size, plans)))
    answer(plans, job, spec, weights, out, progress)
    answers = [_answers(plan, job) for plan in plans]
    everything = [row for rows in answers for row in rows]
    chats = {p["prompt_id"]: p["messages"] for a in asked for p in a.prompts}
    scores = grid.score_texts(grid.texts_of(everything), chats, job.teachers, job, out, progress)
    scored = grid.Scored(scores, given.scales, grid.errors(out))
    judged = _judged(everything, chats, given, job, renderer.special_ids, out, progress) if job.judges else None
    failed = sum((Counter(plan.refused) for plan in plans), Counter[str]())
    done = 0
    refusals: dict[str, Any] = {}
    for part, rows in zip(asked, answers, strict=True):
        table, lost = grid.build(rows, job, cells, scored, judged)
        failed.update(lost)
        done += grid.num_scored(table, rows, job, cells[0], scored)
        part.out.write_table(table, "grid")
        _measure(part, table, job, out)
        refusals |= _refusals(part, table, job)
    if refusals:
        out.write_json(refusals, "refusals.json")
    rows_in = sum(_size(plan) + sum(plan.refused.values()) for plan in plans)
    facts = _facts(job, asked, answers, judged, out)
    tokens = sum(a["num_tokens"] for a in everything)
    return StageResult(rows_in, done, quarantined=dict(sorted(failed.items())), tokens=tokens, facts=facts)


def _planned(
    part: Asked, job: config.Job, cells: Sequence[Levels], space: ControlSpace, renderer: Renderer
) -> tuple[Asked, Plan]:
    """A part and its questions, but for prompts that cannot be rendered, or that leave no room for an answer to one question.

    An engine would end at each of those. They are quarantined; all methods are asked the same prompts, to be compared on them.
    """
    special = _with_special_tokens(part.prompts, renderer)
    readable = [p for p in part.prompts if p["prompt_id"] not in special]
    made = {m: questions(m, readable, cells, samples(m, job), space, renderer) for m in methods(job)}
    long = too_long(made, job)
    refused = {prompt: (schema.SPECIAL_TOKENS, why) for prompt, why in special.items()}
    refused |= {prompt: (TOO_LONG, why) for prompt, why in long.items()}
    if refused:
        bad = [{"stage": "evaluate", "row_id": p, "error": e, "detail": why} for p, (e, why) in sorted(refused.items())]
        part.out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine", "prompts")
        warn_quarantined(current(), bad)
    kept = part._replace(prompts=[p for p in readable if p["prompt_id"] not in long])
    if not kept.prompts:
        what = f"evaluate.sets.{part.name}" if part.name else "evaluate"
        why = "; ".join(sorted({why for _, why in refused.values()})[:3])
        step = "give other prompts or raise model.max_context"
        raise DataError(f"{what}: none of {len(part.prompts)} prompts can be asked: {why}; {step}")
    asked = {m: [q for q in every if q.prompt_id not in long] for m, every in made.items()}
    # what trained methods say is held against the base on the run's own prompts
    plain = {} if part.name else {p["prompt_id"]: renderer.render(p["messages"]) for p in kept.prompts}
    each = sum(map(len, asked.values())) // len(kept.prompts)
    return kept, Plan(asked, part.out, plain, Counter(error for error, _ in refused.values() for _ in range(each)))


def _with_special_tokens(prompts: Sequence[Mapping[str, Any]], renderer: Renderer) -> dict[str, str]:
    """Why prompts cannot be rendered, by prompt_id: their text holds what the tokenizer reads as special tokens."""
    found = {}
    for prompt in prompts:
        try:
            renderer.render(prompt["messages"])
        except DataError as error:
            found[str(prompt["prompt_id"])] = str(error)
    return found


def _size(plan: Plan) -> int:
    return sum(map(len, plan.questions.values()))


def _answers(plan: Plan, job: config.Job) -> Answers:
    """The answers to a plan's questions; an earlier attempt may have asked others."""
    asked = {q.grid_id for every in plan.questions.values() for q in every}
    return [a for a in plan.out.read_table("answers", answers_schema(job)).to_pylist() if a["grid_id"] in asked]


def _sets(
    given: Inputs, job: config.Job, cells: Sequence[Levels], space: ControlSpace, renderer: Renderer, out: Storage
) -> list[Asked]:
    trained_on = {schema.first_human_turn(p["messages"]) for p in given.split("train")}
    probe = [schema.Message(role="user", content="?")]

    def size(method: str, messages: Sequence[schema.Message], cell: Levels) -> int:
        return len(render(method, messages, cell, space, renderer)) + sampling(method, job).max_tokens

    longest = {m: max(cells, key=partial(size, m, probe)) for m in methods(job)}

    def fits(messages: Sequence[schema.Message]) -> bool:
        return max(size(m, messages, cell) for m, cell in longest.items()) <= job.model.max_context

    return [sets.read(s, job.seed, trained_on, fits, out.sub(sets.FOLDER, s.name)) for s in job.evaluate.sets]


def _judged(
    answers: Answers,
    chats: dict[str, Any],
    given: Inputs,
    job: config.Job,
    special_ids: Set[int],
    out: Storage,
    progress: Progress,
) -> grid.Scored:
    """The judges' scores of all answers, what they agree on with the training rewards, and what they make of PPO's course."""
    pool = judging.Pool(given.pool(), job, special_ids)
    reinforced = any(isinstance(o, config.PPO) for o in job.train.objectives)
    rollouts = hacking.rollouts(job, given.trained) if reinforced else []
    texts = {**grid.texts_of(answers), **hacking.texts_of(rollouts)}
    trained_on = {p["prompt_id"]: p["messages"] for p in given.split("train")}
    judged = judging.judge(texts, pool, trained_on | chats, job, out.sub(judging.FOLDER), progress)
    out.write_json(judging.agreement(pool, job, given.scales, judged), judging.FOLDER, "correlation.json")
    if rollouts:
        curves = given.trained.read_json("ppo", "curves.json")
        out.write_json({"ppo": hacking.measure(rollouts, job, judged, curves)}, "hacking.json")
    return judged


def _measure(part: Asked, table: pa.Table, job: config.Job, out: Storage) -> None:
    """Write metrics.json and judge.json of the own prompts, metrics-<set>.json and judge-<set>.json of a set.

    Methods are compared on the own prompts, in comparisons.json, and under the judges in their folder.
    """
    suffix, how = f"-{part.name}" if part.name else "", (job.control, job.evaluate.bootstrap, job.seed)
    measured = evaluate_grid(table, *how)
    if not part.name:
        drift = part.out.read_table(DRIFT, schema.drift())
        for method, kl in kl_by_method(drift, job.evaluate.bootstrap, job.seed).items():
            measured[method]["kl_base"] = kl
    out.write_json(measured, f"metrics{suffix}.json")
    if not part.name:
        out.write_json(compare_grid(table, *how), "comparisons.json")
    if job.judges:
        seen = judging.as_judged(table, job)
        found = evaluate_grid(seen, *how)
        if not part.name:
            found["correlation"] = out.read_json(judging.FOLDER, "correlation.json")
            out.write_json(compare_grid(seen, *how), judging.FOLDER, "comparisons.json")
        out.write_json(found, f"judge{suffix}.json")


def _spent(method: str, answers: Answers, job: config.Job, out: Storage) -> dict[str, float]:
    """Tokens and engine seconds that a method takes for one answer; reranking's are those of all its candidates."""
    tokens = [a["num_tokens"] for a in answers if a["method"] == method]
    times = (samples(method, job) if method == RERANKING else 1) / max(len(tokens), 1)
    return {"tokens": round(times * sum(tokens), 2), "seconds": round(times * lap_seconds(out, method), 4)}


def _refusals(part: Asked, table: pa.Table, job: config.Job) -> dict[str, Any]:
    """`{set: {"attribute", "methods": {method: rates}}}` of a set that is there for over-refusal; see `refusal_rates`."""
    wanted = next((s for s in job.evaluate.sets if s.name == part.name), None)
    if wanted is None or wanted.attribute is None:
        return {}
    labels = {p["prompt_id"]: p["label"] for p in part.prompts}
    by_method: dict[str, Answers] = {}
    for row in table.to_pylist():
        if row["finish_reason"] != DIED:
            by_method.setdefault(row["method"], []).append(row)
    rates = {
        method: refusal_rates(
            [is_refusal(r["text"]) for r in rows],
            [r[f"requested_{wanted.attribute}"] for r in rows],
            [labels[r["prompt_id"]] for r in rows],
            [r["prompt_id"] for r in rows],
            job.evaluate.bootstrap,
            job.seed,
        )
        for method, rows in by_method.items()
    }
    return {part.name: {"attribute": wanted.attribute, "methods": rates}}


def _facts(
    job: config.Job, asked: Sequence[Asked], answers: Sequence[Answers], judged: grid.Scored | None, out: Storage
) -> dict[str, Any]:
    """What stands beside the accounts; `tokens_spent` and `spent`, which is for one answer, are of the own prompts, by method."""
    spent = {m: sum(a["num_tokens"] for a in answers[0] if a["method"] == m) for m in methods(job)}
    facts: dict[str, Any] = {"tokens_spent": spent, "start_s": round(start_seconds(out), 1)}
    facts["spent"] = {m: _spent(m, answers[0], job, out) for m in methods(job)}
    facts["engines_s"] = round(lap_seconds(out, ENGINES), 1)
    if len(asked) > 1:
        of_sets = zip(asked[1:], answers[1:], strict=True)
        facts["sets"] = {a.name: a.out.read_json(sets.ACCOUNTS) | {"answers": len(rows)} for a, rows in of_sets}
    if judged is not None:
        texts = grid.texts_of([row for rows in answers for row in rows])
        facts["not_judged"] = sum(key not in judged.scores for key in texts)
    return facts
