"""Whether a disturbed run ended with what an undisturbed one ends with: rows lost, rows twice, tables that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks.chaos.driver import STAGES
from benchmarks.chaos.job import NAMES
from benchmarks.chaos.plan import PPO
from ctrlray import config, pipeline, schema

Rows = Sequence[Mapping[str, Any]]
ADAPTER = "adapter"


class Difference(NamedTuple):
    """Of a run from the undisturbed one."""

    lost: int
    twice: int
    unequal: tuple[str, ...]
    """Tables that are not the same in full."""


def rows(folder: Path, method: str) -> dict[str, list[dict[str, Any]]]:
    """The final tables of the run of a job file, by name, sorted by the rows' ids; the adapter as a table of its bytes."""
    run = pipeline.Run(config.load_job(folder / "job.yaml"))
    tables: dict[str, tuple[str, pa.Table]] = {
        "prompts": ("prompt_id", run.out("prompts").read_table("prompts", schema.PROMPTS)),
        "responses": ("response_id", run.out("generate").read_table("responses", schema.RESPONSES)),
        "scores": ("response_id", run.out("score").read_table("scores", schema.scores(NAMES))),
        "examples": ("example_id", run.out("distill").read_table("examples", schema.examples(NAMES))),
        "grid": ("grid_id", run.out("evaluate").read_table("grid", schema.grid(NAMES))),
    }
    learned = run.out("train").sub(method)
    if method == PPO:
        tables["rollouts"] = ("rollout_id", learned.read_table("rollouts", schema.rollouts(NAMES)))
    found = {name: [{"id": r[key], **r} for r in table.sort_by(key).to_pylist()] for name, (key, table) in tables.items()}
    return found | {ADAPTER: [{"id": method, "bytes": learned.read_bytes("adapter", "adapter.safetensors")}]}


def differ(found: Mapping[str, Rows], wanted: Mapping[str, Rows]) -> Difference:
    """`found` beside `wanted`; floats are compared to the bit, NaN with NaN."""
    lost = twice = 0
    for name, expected in wanted.items():
        ids = [r["id"] for r in found[name]]
        lost += len({r["id"] for r in expected} - set(ids))
        twice += len(ids) - len(set(ids))
    return Difference(lost, twice, tuple(n for n in wanted if repr(found[n]) != repr(wanted[n])))


def unaccounted(folder: Path) -> list[str]:
    """Stages whose rows in are not rows out + dropped + quarantined."""
    run = pipeline.Run(config.load_job(folder / "job.yaml"))
    results = {stage: run.result(stage) for stage in STAGES}
    return [
        stage
        for stage, r in results.items()
        if r is None or r["rows_in"] != r["rows_out"] + sum(r["dropped"].values()) + sum(r["quarantined"].values())
    ]
