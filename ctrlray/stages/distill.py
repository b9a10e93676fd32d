"""Distill stage: joins prompts, answers and scores, and writes what the pure distillation makes of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from ctrlray import config, models, schema
from ctrlray.control import ControlSpace
from ctrlray.distill import Levels, distill
from ctrlray.ledger import StageResult
from ctrlray.metrics.entanglement import pool_slopes
from ctrlray.tables import Storage


def run(prompts: pa.Table, responses: pa.Table, scores: pa.Table, job: config.Job, out: Storage) -> StageResult:
    """Make the examples table. Deterministic: the same tables give the same bytes. Rows are scores."""
    pool = join(prompts, responses, scores)
    names = [a.name for a in job.control.attributes]
    space = ControlSpace.of(job.control)
    made = distill(pool, job.control, job.distill, job.seed, models.prepare(job.model, space).renderer(space).special_ids)
    out.write_table(made.examples, "examples")
    out.write_table(made.dropped, "dropped")
    facts: dict[str, Any] = {
        "cells_before": made.cells_before,
        "cells_after": made.cells_after,
        "warnings": list(made.warnings),
        "pool_slopes": _slopes(pool, made.levels, names),
    }
    out.write_json({n: made.levels[n].to_dict() for n in names}, "levels.json")
    dropped = dict(sorted(Counter(made.dropped["reason"].to_pylist()).items()))
    return StageResult(scores.num_rows, made.examples.num_rows, dropped, facts=facts)


def join(prompts: pa.Table, responses: pa.Table, scores: pa.Table) -> pa.Table:
    """One row per scored answer with its conversation, sorted by response_id."""
    conversations = {p["prompt_id"]: p["messages"] for p in prompts.to_pylist()}
    where = {r: i for i, r in enumerate(responses["response_id"].to_pylist())}
    found = {r: i for i, r in enumerate(scores["response_id"].to_pylist()) if r in where}
    ids = sorted(found)
    joined = responses.take([where[i] for i in ids])
    for name in scores.column_names:
        if name != "response_id":
            joined = joined.append_column(name, scores[name].take([found[i] for i in ids]))
    messages = pa.array([conversations[p] for p in joined["prompt_id"].to_pylist()], schema.MESSAGES)
    return joined.append_column("messages", messages)


def load_scales(out: Storage) -> dict[str, Levels]:
    """The level scales that `run` stored."""
    return {name: Levels.from_dict(raw) for name, raw in out.read_json("levels.json").items()}


def _slopes(pool: pa.Table, levels: dict[str, Levels], names: list[str]) -> list[list[dict[str, float | None]]]:
    units = np.stack([levels[n].units(np.asarray(pool[f"score_{n}"])) for n in names], axis=1)
    return pool_slopes(units, pool["prompt_id"].to_pylist())
