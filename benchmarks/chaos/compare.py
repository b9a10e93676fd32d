"""Whether a disturbed run ended with what an undisturbed one ends with: rows lost, rows twice, tables that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks.chaos.job import NAMES
from benchmarks.chaos.plan import PPO, Where
from ctrlray import config, pipeline, schema

Rows = Sequence[Mapping[str, Any]]


class Difference(NamedTuple):
    """Of a run from the undisturbed one."""

    lost: int
    twice: int
    unequal: tuple[str, ...]
    """Tables that are not the same in full."""


NONE = Difference(0, 0, ())


def rows(folder: Path, where: Where) -> dict[str, list[dict[str, Any]]]:
    """What the stages that ran made, of the run of a job file: tables by name, sorted by what tells their rows apart."""
    run = pipeline.Run(config.load_job(folder / "job.yaml"))
    made = {name: found for stage in where.stages for name, found in _tables(run, stage, where.method).items()}
    return {name: [{"id": r[key], **r} for r in table.sort_by(key).to_pylist()] for name, (key, table) in made.items()}


def _tables(run: pipeline.Run, stage: str, method: str) -> dict[str, tuple[str, pa.Table]]:
    """A stage's tables, each with the column that tells its rows apart; an adapter is a table of its bytes."""
    out = run.out(stage)
    match stage:
        case "prompts":
            return {"prompts": ("prompt_id", out.read_table("prompts", schema.PROMPTS))}
        case "generate":
            return {"responses": ("response_id", out.read_table("responses", schema.RESPONSES))}
        case "score":
            return {"scores": ("response_id", out.read_table("scores", schema.scores(NAMES)))}
        case "distill":
            return {"examples": ("example_id", out.read_table("examples", schema.examples(NAMES)))}
        case "train":
            learned = out.sub(method)
            adapter = pa.table({"method": [method], "bytes": [learned.read_bytes("adapter", "adapter.safetensors")]})
            rollouts = {"rollouts": ("rollout_id", learned.read_table("rollouts", schema.rollouts(NAMES)))}
            return {"adapter": ("method", adapter)} | (rollouts if method == PPO else {})
        case _:
            drift = out.read_table("drift", schema.drift())
            return {"grid": ("grid_id", out.read_table("grid", schema.grid(NAMES))), "drift": ("grid_id", drift)}


def differ(found: Mapping[str, Rows], wanted: Mapping[str, Rows]) -> Difference:
    """`found` beside `wanted`; floats are compared to the bit, NaN with NaN."""
    lost = twice = 0
    for name, expected in wanted.items():
        ids = [r["id"] for r in found[name]]
        lost += len({r["id"] for r in expected} - set(ids))
        twice += len(ids) - len(set(ids))
    return Difference(lost, twice, tuple(n for n in wanted if repr(found[n]) != repr(wanted[n])))


def unaccounted(folder: Path, where: Where) -> list[str]:
    """Stages whose rows in are not rows out + dropped + quarantined."""
    run = pipeline.Run(config.load_job(folder / "job.yaml"))
    results = {stage: run.result(stage) for stage in where.stages}
    return [
        stage
        for stage, r in results.items()
        if r is None or r["rows_in"] != r["rows_out"] + sum(r["dropped"].values()) + sum(r["quarantined"].values())
    ]
