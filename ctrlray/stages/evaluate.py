"""Evaluate stage: every method on the same held-out prompts and the same grid of settings, then what its answers score.

    own prompts ─┐                            ┌─► training rewards ─┐
    sets ────────┴─► questions ─► engines ────┤                     ├─► grid, metrics.json, judge.json, refusals.json,
    pool, PPO's rollouts ─────────────────────┴─► judges ───────────┘   hacking.json, metrics-<set>.json

One engine start serves all methods and sets: weights are swapped in place, because all methods start from one prepared base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from ctrlray import config, schema
from ctrlray.clock import start_seconds
from ctrlray.control import ControlSpace, Levels, Renderer
from ctrlray.distill import Levels as LevelScale
from ctrlray.engine.engine import EngineSpec
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress, StageResult
from ctrlray.metrics.compare import compare_grid
from ctrlray.metrics.drift import kl_by_method
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.metrics.refusals import refusal_rates
from ctrlray.metrics.texts import is_refusal
from ctrlray.stages import grid, hacking, judging, sets
from ctrlray.stages.questions import DRIFT, Plan, answer, answers_schema, methods, questions, render, samples, sampling
from ctrlray.stages.sets import Asked
from ctrlray.tables import Storage

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

    `weights(method)` is the model folder of a trained method, None for those that run on the prepared base.
    """
    space = ControlSpace.of(job.control)
    cells = space.cells(job.evaluate.levels)
    asked = [Asked("", given.split("eval"), out), *_sets(given, job, cells[0], space, renderer, out)]
    plain = {p["prompt_id"]: renderer.render(p["messages"]) for p in asked[0].prompts}
    plans = [
        Plan(
            {m: questions(m, a.prompts, cells, samples(m, job), space, renderer) for m in methods(job)},
            a.out,
            {} if a.name else plain,
        )
        for a in asked
    ]
    progress.total(sum(len(q) for plan in plans for q in plan.questions.values()))
    answer(plans, job, spec, weights, out, progress)
    answers = [a.out.read_table("answers", answers_schema(job)).to_pylist() for a in asked]
    everything = [row for rows in answers for row in rows]
    chats = {p["prompt_id"]: p["messages"] for a in asked for p in a.prompts}
    scores = grid.score_texts(grid.texts_of(everything), chats, job.teachers, job, out, progress)
    scored = grid.Scored(scores, given.scales)
    judged = _judged(everything, chats, given, job, out, progress) if job.judges else None
    failed: dict[str, int] = {}
    refusals: dict[str, Any] = {}
    for part, rows in zip(asked, answers, strict=True):
        table, lost = grid.build(rows, job, cells, scored, judged)
        failed = {reason: failed.get(reason, 0) + lost.get(reason, 0) for reason in sorted({*failed, *lost})}
        part.out.write_table(table, "grid")
        _measure(part, table, job, out)
        refusals |= _refusals(part, table, job)
    if refusals:
        out.write_json(refusals, "refusals.json")
    return _accounts(job, asked, answers, failed, judged, out)


def _sets(
    given: Inputs, job: config.Job, cell: Levels, space: ControlSpace, renderer: Renderer, out: Storage
) -> list[Asked]:
    trained_on = {schema.first_human_turn(p["messages"]) for p in given.split("train")}

    def fits(messages: Sequence[schema.Message]) -> bool:
        lengths = (len(render(m, messages, cell, space, renderer)) + sampling(m, job).max_tokens for m in methods(job))
        return max(lengths) <= job.model.max_context

    return [sets.read(s, job.seed, trained_on, fits, out.sub(sets.FOLDER, s.name)) for s in job.evaluate.sets]


def _judged(
    answers: Answers, chats: dict[str, Any], given: Inputs, job: config.Job, out: Storage, progress: Progress
) -> grid.Scored:
    """The judges' scores of all answers, what they agree on with the training rewards, and what they make of PPO's course."""
    pool = judging.Pool(given.pool(), job)
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


def _accounts(
    job: config.Job,
    asked: Sequence[Asked],
    answers: Sequence[Answers],
    failed: dict[str, int],
    judged: grid.Scored | None,
    out: Storage,
) -> StageResult:
    """Rows are answers, those of sets among them; `tokens_spent` is of the own prompts, by method."""
    spent = {m: sum(a["num_tokens"] for a in answers[0] if a["method"] == m) for m in methods(job)}
    facts: dict[str, Any] = {"tokens_spent": spent, "start_s": round(start_seconds(out), 1)}
    if len(asked) > 1:
        of_sets = zip(asked[1:], answers[1:], strict=True)
        facts["sets"] = {a.name: a.out.read_json(sets.ACCOUNTS) | {"answers": len(rows)} for a, rows in of_sets}
    everything = [row for rows in answers for row in rows]
    if judged is not None:
        texts = grid.texts_of(everything)
        facts["not_judged"] = sum(key not in judged.scores for key in texts)
    tokens = sum(a["num_tokens"] for a in everything)
    done = len(everything) - sum(failed.values())
    return StageResult(len(everything), done, quarantined=failed, tokens=tokens, facts=facts)
