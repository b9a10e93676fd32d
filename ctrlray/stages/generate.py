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
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from ctrlray import config, schema
from ctrlray.actors import last_line
from ctrlray.clock import note_start, start_seconds
from ctrlray.control import Renderer, with_system
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.errors import ClusterError
from ctrlray.isolate import DIED
from ctrlray.ledger import Progress, StageResult
from ctrlray.patience import Patience
from ctrlray.placement import on_nodes
from ctrlray.stages.journal import IN_FLIGHT, Journal
from ctrlray.tables import Storage, from_rows, slices
from ctrlray.telemetry import Where, current, record_if_restarted, warn


class GenerateBatch:
    """Ray Data actor: a file of requests in, their answers written and passed on."""

    def __init__(self, spec: EngineSpec, sampling: config.Sampling, out: Storage, where: Where) -> None:
        os.environ.update(spec.environment())
        record_if_restarted(where, "engine")
        began = time.monotonic()
        self._engine = spec.build()
        note_start(out, time.monotonic() - began)
        self._sampling = sampling
        self._out, self._where = out, where
        self._journal = Journal(out.sub(IN_FLIGHT))

    def __call__(self, files: pa.Table) -> pa.Table:
        """Answer one file of requests; its answers are written atomically before anything downstream sees them."""
        rows = [r for path in files["path"].to_pylist() for r in self._read(path)]
        ids = [r["response_id"] for r in rows]
        kept = schema.RESPONSES.empty_table()

        def done() -> list[str]:
            nonlocal kept
            kept = self._out.read_table("responses", schema.RESPONSES)
            kept = kept.filter(pc.is_in(kept["response_id"], pa.array(ids)))
            return list(kept["response_id"].to_pylist())

        tables, killers = self._journal.run(ids, lambda group: self._answer([rows[i] for i in group]), done)
        if killers:
            bad = [
                {"stage": "generate", "row_id": ids[i], "error": DIED, "detail": f"alone with it the engine ended: {words}"}
                for i, words in killers.items()
            ]
            self._out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine", f"part-{schema.digest(ids)}")
            for row in bad:
                warn(self._where, f"quarantined, {row['error']}: {row['detail']}", row["row_id"])
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
        self._out.write_table(table, "responses", f"part-{schema.digest(table['response_id'].to_pylist())}")
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


def expand_requests(
    prompts: pa.Table, settings: config.Generate, renderer: Renderer, fingerprint: str, max_prompt: int
) -> tuple[pa.Table, pa.Table]:
    """Every answer to be sampled, and the quarantine rows of prompts that do not fit in the context.

    Samples are dealt over the behaviours in order: with 6 samples and 4 behaviours the first two are used twice. Requests
    are ordered by prompt, so that the samples of one prompt meet in one batch and share its cached prefix.
    """
    requests, refused = [], []
    prefixes = {b.name: renderer.text_ids(b.prefix) for b in settings.behaviours}
    limits = {b.name: b.max_tokens or settings.sampling.max_tokens for b in settings.behaviours}
    for prompt in prompts.to_pylist():
        rendered = {b.name: renderer.render(with_system(prompt["messages"], b.system)) for b in settings.behaviours}
        for i in range(settings.samples):
            behaviour = settings.behaviours[i % len(settings.behaviours)].name
            sample = i // len(settings.behaviours)
            ids, prefix = rendered[behaviour], prefixes[behaviour]
            key = schema.response_id(prompt["prompt_id"], behaviour, sample, fingerprint)
            if len(ids) + len(prefix) > max_prompt:
                detail = f"prompt {prompt['prompt_id']} has {len(ids)} tokens, the context leaves room for {max_prompt}"
                refused.append({"stage": "generate", "row_id": key, "error": "prompt_too_long", "detail": detail})
                continue
            requests.append(
                {
                    "response_id": key,
                    "prompt_id": prompt["prompt_id"],
                    "behaviour": behaviour,
                    "sample": sample,
                    "prompt_token_ids": ids,
                    "prefix_token_ids": prefix,
                    "max_tokens": limits[behaviour],
                }
            )
    return from_rows(requests, schema.REQUESTS), from_rows(refused, schema.QUARANTINE)


def run(
    prompts: pa.Table,
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
    requests, refused = expand_requests(prompts, settings, renderer, fingerprint, max_prompt)
    Journal(out.sub(IN_FLIGHT)).clear()
    done = set(out.read_table("responses", schema.RESPONSES, ["response_id"])["response_id"].to_pylist())
    done |= {r["row_id"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    pending = requests.filter(pa.array([r not in done for r in requests["response_id"].to_pylist()], pa.bool_()))
    progress.total(requests.num_rows)
    progress.advance(requests.num_rows - pending.num_rows)
    if refused.num_rows:
        out.write_table(refused, "quarantine")
    if pending.num_rows:
        progress.note("starting vLLM")
        blocks = write_blocks(pending, out, settings.batch_size)
        stream = generate_stream(blocks, out, settings, spec)
        consume(then(stream) if then else stream, progress, patience)
    return _accounts(requests, refused.num_rows, out, settings.pool.max_size)


def write_blocks(pending: pa.Table, out: Storage, rows: int) -> list[str]:
    """Write pending requests as one file per batch: each file becomes one block, so that work streams."""
    name = f"requests-{schema.digest(pending['response_id'].to_pylist())}"
    for i, block in enumerate(slices(pending, rows)):
        out.write_table(block, name, f"part-{i:06d}")
    return [out.path(name, f) for f in out.names(name, suffix=".parquet")]


def generate_stream(blocks: Sequence[str], out: Storage, settings: config.Generate, spec: EngineSpec) -> ray.data.Dataset:
    """The lazy stream of answered blocks: one file of requests is one block, read by the engine's own actor."""
    files = ray.data.from_items([{"path": path} for path in blocks], override_num_blocks=len(blocks))
    return files.map_batches(
        GenerateBatch,
        fn_constructor_args=(spec, settings.sampling, out, current()),
        batch_size=1,
        batch_format="pyarrow",
        **actor_options(settings.pool, gpus=settings.pool.gpus * settings.engine.tensor_parallel),
    )


def actor_options(pool: config.Pool, gpus: float | None = None) -> dict[str, Any]:
    """Arguments of `map_batches` for a pool: its size, its resources, and an end to restarts (Ray Data's own has none)."""
    return {
        "compute": ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size, max_tasks_in_flight_per_actor=2),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus if gpus is None else gpus,
        "resources": on_nodes(pool.nodes),
        "max_restarts": pool.max_restarts,
        "max_task_retries": pool.max_restarts,
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
            progress.advance(
                block.num_rows, sum(map(len, block["token_ids"].to_pylist())) if "token_ids" in block.column_names else 0
            )
    except ray.exceptions.RayActorError as error:
        often = f"an actor died more often than pool.max_restarts allows, with {patience.waits_for()}"
        what = "an actor did not start" if error.actor_init_failed else often
        raise ClusterError(f"{patience.stage}: {what}; it ended with: {last_line(error)}. What is finished is kept.") from error


def _accounts(requests: pa.Table, num_refused: int, out: Storage, engines: int) -> StageResult:
    out.check_unique("responses", schema.RESPONSES, "response_id")
    made = out.read_table("responses", schema.RESPONSES, ["response_id", "token_ids", "finish_reason"])
    wanted = set(requests["response_id"].to_pylist())
    unique = {r["response_id"]: r for r in made.to_pylist() if r["response_id"] in wanted}
    bad = {r["row_id"]: r["error"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    quarantined = dict(Counter(error for key, error in bad.items() if key not in unique))
    reasons = dict(Counter(r["finish_reason"] for r in unique.values()))
    tokens = sum(len(r["token_ids"]) for r in unique.values())
    facts = {"finish_reasons": reasons, "start_s": round(start_seconds(out) / engines, 1)}  # engines start side by side
    return StageResult(requests.num_rows + num_refused, len(unique), {}, quarantined, tokens, facts)
