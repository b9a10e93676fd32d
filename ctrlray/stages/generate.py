"""Generate stage: prompts in, sampled answers out, by Ray Data over a pool of vLLM actors.

    prompts -> requests (rendered, written in blocks) -> [GenerateBatch actors] -> responses, a block at a time
                                                               └-> [ScoreBatch actors] when scoring streams behind

Requests are expanded first, so every answer's id is known before it exists; a restart samples only those that are missing.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from ctrlray import config, schema
from ctrlray.actors import last_line
from ctrlray.clock import note_start, start_seconds
from ctrlray.control import Renderer
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.errors import ClusterError
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress, StageResult
from ctrlray.patience import Patience
from ctrlray.placement import WRITE_CPUS, on_nodes, writers
from ctrlray.stages.journal import IN_FLIGHT, Journal, set_aside
from ctrlray.stages.requests import (
    ExpandRange,
    Keys,
    PromptParts,
    all_keys,
    among,
    expand_requests,
    keys,
    ranges,
    write_blocks,
)
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import Where, current, record_if_restarted, warn, warn_quarantined


class GenerateBatch:
    """Ray Data actor: a file of requests in, their answers written and passed on."""

    def __init__(self, spec: EngineSpec, sampling: config.Sampling, out: Storage, where: Where, max_restarts: int) -> None:
        os.environ.update(spec.environment())
        record_if_restarted(where, "engine")
        self._sampling = sampling
        self._out, self._where = out, where
        self._journal = Journal(out.sub(IN_FLIGHT))
        if not self._journal.start(max_restarts):  # its first batch says so: what a constructor raises reaches nobody
            return
        began = time.monotonic()
        self._engine = spec.build()
        note_start(out, time.monotonic() - began)

    def __call__(self, files: pa.Table) -> pa.Table:
        """Answer one file of requests; its answers are written atomically before anything downstream sees them."""
        rows = [r for path in files["path"].to_pylist() for r in self._read(path)]
        ids = [r["response_id"] for r in rows]
        part = _part(ids)
        if self._out.exists("responses", f"{part}.parquet"):  # a lost node held it: Ray makes its blocks anew
            return self._out.read_part("responses", part, schema.RESPONSES)
        kept = schema.RESPONSES.empty_table()

        def done() -> list[str]:
            nonlocal kept
            mine = (b.filter(pc.is_in(b["response_id"], pa.array(ids))) for b in self._out.batches("responses", schema.RESPONSES))
            kept = pa.Table.from_batches(list(mine), schema.RESPONSES)
            return list(kept["response_id"].to_pylist())

        def aside(row: str, words: str) -> None:
            set_aside(self._out, self._where, "generate", row, DIED, f"alone with it the engine ended: {words}")

        tables, _ = self._journal.run(ids, lambda group: self._answer([rows[i] for i in group]), done, aside)
        made = pa.concat_tables([kept, *tables])
        # in the order asked for, so that who works on this block after its node was lost makes the very same block again
        place = {key: i for i, key in enumerate(made["response_id"].to_pylist())}
        return made.take(pa.array([place[key] for key in ids if key in place], pa.int64()))

    def _answer(self, rows: list[dict[str, Any]]) -> pa.Table:
        try:
            prompts = [r["prompt_token_ids"] + r["prefix_token_ids"] for r in rows]
            answers = self._engine.generate(prompts, self._sampling, max_tokens=[r["max_tokens"] for r in rows])
        except Exception as error:  # vLLM promises nothing about an engine that raised: the next one starts clean
            warn(self._where, f"ending the engine, which held {len(rows)} rows: {error}", rows[0]["response_id"])
            self._journal.die(error)
            raise
        if not self._journal.holds():
            warn(self._where, f"ending the engine: another has its {len(rows)} rows by now", rows[0]["response_id"])
            os._exit(1)
        made = (self._response(r, samples[0]) for r, samples in zip(rows, answers, strict=True))
        table = from_rows(made, schema.RESPONSES)
        self._out.write_table(table, "responses", _part(table["response_id"].to_pylist()))
        return table

    def _read(self, path: str) -> list[dict[str, Any]]:
        return list(pq.read_table(path, filesystem=self._out.filesystem).to_pylist())

    def _response(self, request: dict[str, Any], answer: Completion) -> dict[str, Any]:
        prefix = request["prefix_token_ids"]
        return {
            "response_id": request["response_id"],
            "prompt_id": request["prompt_id"],
            "behaviour": request["behaviour"],
            "text": (self._engine.decode(prefix) + answer.text if prefix else answer.text).strip(),
            "token_ids": prefix + answer.token_ids,
            "logprob_sum": answer.logprob_sum,
            "finish_reason": answer.finish_reason,
            "weights_version": self._engine.weights_version,
            "prompt_tokens": len(request["prompt_token_ids"]),
        }


def _part(ids: Sequence[str]) -> str:
    """Name of the part that holds these rows."""
    return f"part-{schema.digest(list(ids))}"


def run(
    prompts: pa.Table | PromptParts,
    settings: config.Generate,
    spec: EngineSpec,
    renderer: Renderer,
    fingerprint: str,
    out: Storage,
    progress: Progress,
    patience: Patience,
    then: Callable[[ray.data.Dataset], ray.data.Dataset] | None = None,
) -> StageResult:
    """Sample all answers that `out` lacks. `then` extends the stream, for example by scoring behind generation."""
    max_prompt = spec.max_context - settings.sampling.max_tokens
    Journal(out.sub(IN_FLIGHT)).clear()
    done = _done(out)
    if isinstance(prompts, PromptParts) and len(prompts.names) <= 1:
        prompts = prompts.table()
    if isinstance(prompts, PromptParts):
        items, total = ranges(prompts, settings, fingerprint, done)
        pending = sum(i["rows"] - len(i["done"]) for i in items)
        write = partial(_expanded, items, settings, (prompts.place, settings, renderer, fingerprint, max_prompt, out, current()))
    else:
        made, refused = expand_requests(prompts, settings, renderer, fingerprint, max_prompt)
        if refused.num_rows:
            out.write_table(refused, "quarantine")
            warn_quarantined(current(), refused.to_pylist())
        ids = keys(made["response_id"].to_pylist())
        asked = np.concatenate([ids, keys(refused["row_id"].to_pylist())])
        todo = made.filter(pa.array(~among(ids, done)))
        total, pending = made.num_rows, todo.num_rows
        write = partial(_written, todo, settings, out)
    progress.total(total)
    progress.advance(total - pending)
    if pending:
        progress.note("starting vLLM")
        extended = then or (lambda stream: stream)
        # no name for the stream: what it holds of each block goes before the accounts are made
        consume(extended(generate_stream(write(), out, settings, spec)), progress, patience)
    if isinstance(prompts, PromptParts):
        asked = all_keys(prompts, settings, fingerprint)  # now, when no engine waits for it
    return _accounts(asked, out, settings.pool.max_size)


def _done(out: Storage) -> Keys:
    """What was answered or quarantined before."""
    answered = [keys(b["response_id"].to_pylist()) for b in out.batches("responses", schema.RESPONSES, ["response_id"])]
    bad = keys(out.read_table("quarantine", schema.QUARANTINE)["row_id"].to_pylist())
    return np.unique(np.concatenate([*answered, bad]))


def _written(pending: pa.Table, settings: config.Generate, out: Storage) -> ray.data.Dataset:
    """Files of requests that the driver writes."""
    return files(write_blocks(pending, out, settings.batch_size))


def _expanded(items: Sequence[Mapping[str, Any]], settings: config.Generate, recipe: tuple[Any, ...]) -> ray.data.Dataset:
    """Files of requests that actors write while others are answered."""
    rows = ray.data.from_items(list(items), override_num_blocks=len(items))
    number = writers(settings.pool.max_size)
    return rows.map_batches(
        ExpandRange,
        fn_constructor_args=recipe,
        batch_size=1,
        batch_format="pyarrow",
        **actor_options(config.Pool(min_size=number, max_size=number, cpus=WRITE_CPUS)),
    )


def files(blocks: Sequence[str]) -> ray.data.Dataset:
    """Files of requests, each a block of its own."""
    return ray.data.from_items([{"path": path} for path in blocks], override_num_blocks=len(blocks))


def generate_stream(
    requests: ray.data.Dataset, out: Storage, settings: config.Generate, spec: EngineSpec
) -> ray.data.Dataset:
    """The lazy stream of answered blocks: one file of requests is one block, read by the engine's own actor."""
    return requests.map_batches(
        GenerateBatch,
        fn_constructor_args=(spec, settings.sampling, out, current(), settings.pool.max_restarts),
        batch_size=1,
        batch_format="pyarrow",
        **actor_options(settings.pool, gpus=settings.pool.gpus * settings.engine.tensor_parallel, journaled=True),
    )


def actor_options(pool: config.Pool, gpus: float | None = None, journaled: bool = False) -> dict[str, Any]:
    """Arguments of `map_batches` for a pool: its size, its resources, and an end to restarts (Ray Data's own has none).

    Ray counts restarts over an actor's life. Actors that keep a journal and `start` it are restarted without end by Ray: the
    journal counts those in vain, and ends the stage.
    """
    restarts = -1 if journaled else pool.max_restarts
    return {
        "compute": ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size, max_tasks_in_flight_per_actor=2),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus if gpus is None else gpus,
        "resources": on_nodes(pool.nodes),
        "max_restarts": restarts,
        "max_task_retries": restarts,
    }


def journals(out: Storage) -> list[Journal]:
    """The notes of what this stage's actors are working on."""
    return [Journal(out.sub(IN_FLIGHT))]


def patience(stage: str, timeout_s: float, notes: Sequence[Journal]) -> Patience:
    """Patience with a stream whose actors keep these notes."""
    return Patience(stage, timeout_s, lambda: waits_for([n for j in notes for n in j.in_flight()]))


def waits_for(notes: Sequence[Mapping[str, Any]]) -> str:
    """What a stream waits for: the rows that its actors hold, or actors that have not started."""
    if not notes:
        free, there = ray.available_resources(), ray.cluster_resources()
        room = ", ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}s are free" for kind in ("CPU", "GPU"))
        return f"an actor to start or to take up work ({room})"
    old = notes[0]
    rows = sum(len(n["rows"]) for n in notes)
    said = next((f"; the last error was {n['error']}" for n in reversed(notes) if n["error"]), "")
    oldest = f"the oldest since {old['since']} in process {old['process']}, first of them {old['first']}"
    return f"{rows} rows in flight, {oldest}{said}"


def consume(stream: ray.data.Dataset, progress: Progress, patience: Patience) -> None:
    """Run a stream to its end, reporting each block; the blocks themselves were written by the actors."""
    blocks = stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    try:
        for block in patience.each(blocks):
            progress.advance(block.num_rows, num_tokens(block))
    except ray.exceptions.RayActorError as error:
        often = f"an actor died more often than pool.max_restarts allows, with {patience.waits_for()}"
        what = "an actor did not start" if error.actor_init_failed else often
        raise ClusterError(f"{patience.stage}: {what}; it ended with: {last_line(error)}. What is finished is kept.") from error


def num_tokens(block: pa.Table) -> int:
    """Of all answers of a block, which has them, or how many each has, or neither."""
    if "token_ids" in block.column_names:
        return int(pc.sum(pc.list_value_length(block["token_ids"])).as_py() or 0)
    return int(pc.sum(block["num_tokens"]).as_py() or 0) if "num_tokens" in block.column_names else 0


def _accounts(asked: Keys, out: Storage, engines: int) -> StageResult:
    """What became of each request of `asked`, which it sorts. Of each it holds eight bytes and whether it is answered."""
    asked.sort()
    answered = np.zeros(asked.size, np.bool_)
    finished: Counter[str] = Counter()
    tokens, twice = 0, False
    for batch in out.batches("responses", schema.RESPONSES, ["response_id", "token_ids", "finish_reason"]):
        ids = keys(batch["response_id"].to_pylist())
        mine = np.flatnonzero(among(ids, asked))
        places, first = np.unique(np.searchsorted(asked, ids[mine]), return_index=True)
        new = ~answered[places]
        twice |= places.size < mine.size or not new.all()
        answered[places] = True
        rows = batch.take(pa.array(mine[first[new]]))
        tokens += int(pc.sum(rows["token_ids"].value_lengths()).as_py() or 0)
        finished.update(rows["finish_reason"].to_pylist())
    if twice:
        out.check_unique("responses", schema.RESPONSES, "response_id")
    bad = {r["row_id"]: r["error"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    lost = ~among(keys(list(bad)), asked[answered])
    quarantined = dict(Counter(error for error, is_lost in zip(bad.values(), lost, strict=True) if is_lost))
    # engines start side by side
    facts = {"finish_reasons": dict(finished), "start_s": round(start_seconds(out) / engines, 1)}
    return StageResult(asked.size, int(answered.sum()), {}, quarantined, tokens, facts)
