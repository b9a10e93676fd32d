"""Score stage: answers in, one float per attribute out, by pools of reward actors under Ray Data.

The same actors score a finished table, a stream behind generation, and the evaluation grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from ctrlray import config, schema
from ctrlray.errors import CtrlRayError
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress, StageResult
from ctrlray.patience import Patience
from ctrlray.placement import WRITE_CPUS, writers
from ctrlray.rewards.base import Scorer
from ctrlray.rewards.registry import build
from ctrlray.rewards.rows import by_length, died, score_rows, yield_to_engines
from ctrlray.schema import Message
from ctrlray.stages.generate import actor_options, consume, patience
from ctrlray.stages.journal import IN_FLIGHT, Journal, set_aside
from ctrlray.stages.requests import Keys, among, joined, keys, num_among
from ctrlray.tables import Storage, from_rows, slices
from ctrlray.telemetry import NOWHERE, Where, current, record_if_restarted, warn_quarantined

TRUNCATED = "truncated"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
Conversations = Mapping[str, Sequence[Message]]


class ScoreBatch:
    """Ray Data actor: adds the outputs of one reward to a batch of (response_id, prompt_id, text)."""

    def __init__(
        self,
        reward: config.Reward,
        conversations: Any,
        keep_truncated: bool,
        journal: Journal,
        max_restarts: int,
        out: Storage | None = None,
        where: Where = NOWHERE,
        place: str = "rewards",
    ) -> None:
        yield_to_engines()
        record_if_restarted(where, "reward actor")
        self._journal = journal
        self._keep_truncated = keep_truncated
        self._out, self._where = out, where
        self._refusal: CtrlRayError | None = None
        if not journal.start(max_restarts):  # its first batch says so
            return
        try:
            self._scorer: Scorer = build(reward, place)
        except CtrlRayError as error:  # Ray would start the actor again and again, and then not say why
            self._refusal = error
        self._conversations: Conversations = ray.get(conversations)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add one `raw_<output>` column per output, NaN where the reward failed, and the failures' reasons.

        Rows that end processes are written to the quarantine of `out`, where there is one, as soon as they are known.
        """
        if self._refusal is not None:
            raise self._refusal
        ids = batch["response_id"].to_pylist()
        parts, killers = self._journal.run(ids, lambda group: self._score(batch.take(group)), aside=self._set_aside)
        if killers or not parts:
            left_out = batch.take(pa.array(list(killers), pa.int64()))
            parts.append(self._with_columns(left_out, {}, [died(words) for words in killers.values()]))
        return pa.concat_tables(parts)

    def _set_aside(self, row: str, words: str) -> None:
        if self._out is not None:
            set_aside(self._out, self._where, "score", row, DIED, died(words))

    def _score(self, batch: pa.Table) -> pa.Table:
        errors = self._errors_so_far(batch)
        todo = [i for i, error in enumerate(errors) if not error]
        texts, prompts = batch["text"].to_pylist(), batch["prompt_id"].to_pylist()
        chats = [self._conversations[prompts[i]] for i in todo]
        columns, failures = score_rows(self._scorer, chats, [texts[i] for i in todo])
        for i, failure in zip(todo, failures, strict=True):
            errors[i] = failure
        spread = {name: np.full(len(errors), np.nan, np.float32) for name in columns}
        for name, values in spread.items():
            values[todo] = columns[name]
        return self._with_columns(batch, spread, errors)

    def _with_columns(self, batch: pa.Table, columns: Mapping[str, Any], errors: list[str]) -> pa.Table:
        kept = batch.drop_columns(["error"]) if "error" in batch.column_names else batch
        for name in self._scorer.attributes:
            values = columns.get(name, np.full(batch.num_rows, np.nan, np.float32))
            kept = kept.append_column(f"raw_{name}", pa.array(values, pa.float32()))
        return kept.append_column("error", pa.array(errors, pa.string()))

    def _errors_so_far(self, batch: pa.Table) -> list[str]:
        """What an earlier reward said of each row; answers that were cut off are passed on without a score."""
        if "error" in batch.column_names:
            return [str(e) for e in batch["error"].to_pylist()]
        if self._keep_truncated or "finish_reason" not in batch.column_names:
            return [""] * batch.num_rows
        return ["" if r in schema.FINISHED else TRUNCATED for r in batch["finish_reason"].to_pylist()]


class WriteScores:
    """Writes finished score blocks: rows with all scores to `scores`, the others to `quarantine`, each with its reason."""

    def __init__(
        self, attributes: Sequence[tuple[str, Mapping[str, float]]], out: Storage, where: Where = NOWHERE
    ) -> None:
        self._attributes = list(attributes)
        self._out, self._where = out, where

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write one block; passes on what is counted: an id for each answer, and its tokens where it has any."""
        good, bad = [], []
        said = [c for c in batch.column_names if c in ("response_id", "error") or c.startswith("raw_")]
        for row in batch.select(said).to_pylist():
            if row["error"].split(":")[0] in (TRUNCATED, DIED):  # dropped, and written by the actor that found it
                continue
            if row["error"]:
                bad.append(
                    {"stage": "score", "row_id": row["response_id"], "error": row["error"].split(":")[0], "detail": row["error"]}
                )
            else:
                scores = {
                    f"score_{name}": sum(weight * row[f"raw_{source}"] for source, weight in sources.items())
                    for name, sources in self._attributes
                }
                if odd := [name for name, value in scores.items() if not abs(value) <= _FLOAT32_MAX]:
                    detail = f"{odd[0]}={scores[odd[0]]} is no float32; lower the weights in control.attributes.score"
                    bad.append({"stage": "score", "row_id": row["response_id"], "error": "not_finite", "detail": detail})
                    continue
                good.append({"response_id": row["response_id"], **scores})
        part = f"part-{schema.digest(batch['response_id'].to_pylist())}"
        if good:
            self._out.write_table(from_rows(good, schema.scores([n for n, _ in self._attributes])), "scores", part)
        if bad:
            self._out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine", part)
            warn_quarantined(self._where, bad)
        counted = batch.select(["response_id"])
        if "token_ids" in batch.column_names:
            counted = counted.append_column("num_tokens", pc.list_value_length(batch["token_ids"]))
        return counted


def journals(rewards: Sequence[config.Reward], out: Storage) -> list[Journal]:
    """The notes of what each reward's actors are working on."""
    return [Journal(out.sub(IN_FLIGHT, str(i))) for i in range(len(rewards))]


def patience_of(stage: str, job: config.Job, rewards: Sequence[config.Reward], out: Storage) -> Patience:
    """Patience with scoring by `rewards` below `out`."""
    return patience(stage, job.cluster.stall_timeout_s, journals(rewards, out))


def score_stream(
    rows: ray.data.Dataset, job: config.Job, rewards: Sequence[config.Reward], conversations: Conversations, out: Storage
) -> ray.data.Dataset:
    """Extend a stream of answers by one pool per reward and the writers of finished blocks."""
    shared = ray.put(conversations)
    Journal(out.sub(IN_FLIGHT)).clear()
    for reward, journal, place in zip(rewards, journals(rewards, out), job.places(rewards), strict=True):
        rows = rows.map_batches(
            ScoreBatch,
            fn_constructor_args=(
                reward,
                shared,
                job.distill.keep_truncated,
                journal,
                job.score.pool.max_restarts,
                out,
                current(),
                place,
            ),
            batch_size=None,
            batch_format="pyarrow",
            **actor_options(job.score.pool, journaled=True),
        )
    pairs = [(a.name, a.sources) for a in job.control.attributes]
    number = writers(job.generate.pool.max_size)
    return rows.map_batches(
        WriteScores,
        fn_constructor_args=(pairs, out, current()),
        batch_size=None,
        batch_format="pyarrow",
        **actor_options(config.Pool(min_size=number, max_size=number, cpus=WRITE_CPUS)),
    )


def run(
    responses: pa.Table | Storage, conversations: Conversations, job: config.Job, out: Storage, progress: Progress
) -> StageResult:
    """Score all answers that `out` lacks. Answers cut off at max_tokens are dropped unless the job keeps them.

    Of `responses` where they are stored, only those without a score are held in memory.
    """
    names = job_attributes(job)
    scored = _scored(out, names)
    failed = {r["row_id"]: r["error"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    total = 0
    finished: list[Keys] = []
    missing: list[Keys] = []
    for batch in _answers(responses, ["response_id", "finish_reason"]):
        ids = scorable(batch, job)["response_id"].to_pylist()
        total += batch.num_rows
        finished.append(keys(ids))
        todo = ~among(finished[-1], scored) & np.array([i not in failed for i in ids], np.bool_)
        missing.append(finished[-1][todo])
    wanted, left = joined(finished), joined(missing)
    finished.clear()
    progress.total(wanted.size)
    progress.advance(wanted.size - left.size)
    if left.size:
        progress.note("starting reward actors")
        blocks = slices(_with_texts(responses, left), job.score.batch_size)
        stream = score_stream(ray.data.from_arrow(blocks), job, job.teachers, conversations, out)
        consume(stream, progress, patience_of("score", job, job.teachers, out))
        scored = _scored(out, names)
    facts = {"streamed_behind": "generate"} if wanted.size and not left.size else {}
    return _accounts(total, wanted, scored, out, facts)


def _with_texts(responses: pa.Table | Storage, left: Keys) -> pa.Table:
    """The answers in `left`, which is sorted, as rewards take them."""
    columns = ["response_id", "prompt_id", "text"]
    found = [b.filter(pa.array(among(keys(b["response_id"].to_pylist()), left))) for b in _answers(responses, columns)]
    return pa.Table.from_batches([b for b in found if b.num_rows])


def _answers(responses: pa.Table | Storage, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if isinstance(responses, Storage):
        return responses.batches("responses", schema.RESPONSES, columns)
    return iter(responses.select(columns).to_batches())


def _scored(out: Storage, names: Sequence[str]) -> Keys:
    """Answers with scores, sorted. Raises DataError when one is there twice."""
    found = joined(keys(b["response_id"].to_pylist()) for b in out.batches("scores", schema.scores(names), ["response_id"]))
    if (found[1:] == found[:-1]).any():
        out.check_unique("scores", schema.scores(names), "response_id")
    return found


def score_answers(
    reward: config.Reward,
    answers: Sequence[tuple[Sequence[Message], str]],
    pool: config.Pool,
    batch_size: int,
    notes: Storage,
    progress: Progress,
    stall_timeout_s: float,
) -> tuple[dict[str, Any], list[str]]:
    """Scores of (conversation, answer) pairs outside of a run: float32 [N] by output, NaN where it failed, and N errors.

    An error is empty where all is well. `notes` is a folder for notes of what is in flight.
    """
    chats = {schema.prompt_id(chat): list(chat) for chat, _ in answers}
    order = by_length([chat for chat, _ in answers], [text for _, text in answers])
    table = pa.table(
        {
            "response_id": pa.array([str(i) for i in order], pa.string()),
            "prompt_id": pa.array([schema.prompt_id(answers[i][0]) for i in order], pa.string()),
            "text": pa.array([answers[i][1] for i in order], pa.string()),
        }
    )
    journal = Journal(notes)
    journal.clear()
    rows = ray.data.from_arrow(slices(table, batch_size)).map_batches(
        ScoreBatch,
        fn_constructor_args=(reward, ray.put(chats), True, journal, pool.max_restarts, None, current(), "reward"),
        batch_size=None,
        batch_format="pyarrow",
        **actor_options(pool, journaled=True),
    )
    progress.total(len(answers))
    scores: dict[str, Any] = {}
    errors = [f"{DIED}: no score came back"] * len(answers)
    for block in patience("score", stall_timeout_s, [journal]).each(rows.iter_batches(batch_size=None, batch_format="pyarrow")):
        where = np.array(block["response_id"].to_pylist(), np.int64)
        for name in (n for n in block.column_names if n.startswith("raw_")):
            values = scores.setdefault(name.removeprefix("raw_"), np.full(len(answers), np.nan, np.float32))
            values[where] = block[name].to_numpy()
        for i, error in zip(where, block["error"].to_pylist(), strict=True):
            errors[i] = error
        progress.advance(block.num_rows)
    journal.clear()
    return scores, errors


def scorable(responses: pa.RecordBatch, job: config.Job) -> pa.RecordBatch:
    """Answers that get a score: the finished ones, or all when the job keeps truncated answers."""
    if job.distill.keep_truncated:
        return responses
    return responses.filter(pa.array([r in schema.FINISHED for r in responses["finish_reason"].to_pylist()], pa.bool_()))


def job_attributes(job: config.Job) -> list[str]:
    """Attribute names in the control space's order."""
    return [a.name for a in job.control.attributes]


def _accounts(total: int, wanted: Keys, scored: Keys, out: Storage, facts: Mapping[str, str]) -> StageResult:
    """Of so many answers, of which those in `wanted`, which is sorted, should have scores."""
    bad = {r["row_id"]: r["error"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    theirs = keys(list(bad))
    lost = among(theirs, wanted) & ~among(theirs, scored)
    failed = Counter(error for error, is_lost in zip(bad.values(), lost, strict=True) if is_lost)
    dropped = {"truncated": total - wanted.size} if total > wanted.size else {}
    return StageResult(total, num_among(scored, wanted), dropped, dict(failed), facts=facts)
