"""Whether a disturbed run ended with what an undisturbed one ends with: rows lost, rows twice, tables that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks.chaos.job import NAMES
from benchmarks.chaos.plan import PPO, Where
from ctrlray import config, pipeline, schema
from ctrlray.tables import Storage

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
            chosen = {"examples": ("example_id", out.read_table("examples", schema.examples(NAMES)))}
            left_out = {"dropped": ("response_id", out.read_table("dropped", schema.DROPPED))}
            return chosen | left_out | _json(out, "levels")
        case "train":
            learned = out.sub(method)
            adapter = pa.table({"method": [method], "bytes": [learned.read_bytes("adapter", "adapter.safetensors")]})
            losses = ("policy", "value") if method == PPO else ("loss",)
            points = learned.read_json("curves.json")
            curve = pa.Table.from_pylist([{name: p[name] for name in ("step", *losses)} for p in points])
            made = {"adapter": ("method", adapter), "losses": ("step", curve)}
            if method == PPO:
                return made | {"rollouts": ("rollout_id", learned.read_table("rollouts", schema.rollouts(NAMES)))}
            return made | {"code gaps": ("example_id", learned.read_table("code_gaps", schema.code_gaps()))}
        case _:
            drift = out.read_table("drift", schema.drift())
            made = {"grid": ("grid_id", out.read_table("grid", schema.grid(NAMES))), "drift": ("grid_id", drift)}
            return made | _json(out, "metrics") | _json(out, "comparisons")


def _json(out: Storage, name: str) -> dict[str, tuple[str, pa.Table]]:
    """A JSON file as a table of one row."""
    return {name: ("name", pa.table({"name": [name], "text": [json.dumps(out.read_json(f"{name}.json"), sort_keys=True)]}))}


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
