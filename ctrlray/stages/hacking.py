"""Reward hacking of an evaluated run: PPO's recorded rollouts under the training rewards and under the judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctrlray import config, schema
from ctrlray.errors import DataError
from ctrlray.metrics.hacking import parting
from ctrlray.objectives.advantages import level_reward, shaped_reward
from ctrlray.stages.grid import Scored, Texts, text_id
from ctrlray.stages.score import job_attributes
from ctrlray.tables import Storage

MAX_POINTS = 20
_COLUMNS = ("rollout_id", "step", "prompt_id", "text", "finish_reason", "error")


def rollouts(job: config.Job, trained: Storage) -> list[dict[str, Any]]:
    """The rollouts that judges score: `evaluate.judged_rollouts` of those trained on, as many of each step, drawn by hash."""
    names = job_attributes(job)
    columns = [*_COLUMNS, *(f"{kind}_{n}" for n in names for kind in ("requested", "units"))]
    table = trained.sub("ppo").read_table("rollouts", schema.rollouts(names), columns)
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        if not row["error"]:
            by_step.setdefault(row["step"], []).append({**row, "text": row["text"].strip()})
    most = max(1, job.evaluate.judged_rollouts // max(1, len(by_step)))
    return [
        row
        for step in sorted(by_step)
        for row in sorted(by_step[step], key=lambda r: schema.digest(job.seed, "judged", r["rollout_id"]))[:most]
    ]


def texts_of(rows: Sequence[Mapping[str, Any]]) -> Texts:
    """The distinct texts of rollouts."""
    return {text_id(r["prompt_id"], r["text"]): (r["prompt_id"], r["text"]) for r in rows}


def measure(
    rows: Sequence[Mapping[str, Any]], job: config.Job, judged: Scored, curves: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """`{"points": [{step, reward, judge, kl, length, rollouts}], "rule", "alarm", "changes"}`; see `metrics.hacking.parting`.

    `reward` and `judge` are the objective's reward in level units, by either's achieved levels; a point stands for the steps
    up to `step`, at most 20 for the whole training. `kl` (nats per response) and `length` (tokens) are those that training
    measured of all its rollouts; `kl` is null where none of the steps measured one. `curves` has a mapping for each step.
    """
    (ppo,) = (o for o in job.train.objectives if isinstance(o, config.PPO))
    names = job_attributes(job)
    ids = [text_id(r["prompt_id"], r["text"]) for r in rows]
    units_NA = np.column_stack([judged.units(n, ids) for n in names])
    fine = np.isfinite(units_NA).all(axis=1)
    kept = [r for r, f in zip(rows, fine, strict=True) if f]
    if not kept:
        raise DataError(f"evaluate: the judges scored none of {len(rows)} rollouts; look at the quarantine of its judge folder")
    own_NA = np.array([[r[f"units_{n}"] for n in names] for r in kept])
    reward, judge = (_rewards(ppo, names, kept, units) for units in (own_NA, units_NA[fine]))
    step_N = np.array([r["step"] for r in kept]) + 1
    points = []
    for bucket in np.array_split(np.unique(step_N), min(MAX_POINTS, len(np.unique(step_N)))):
        here = np.isin(step_N, bucket)
        measured = [c for c in curves if bucket[0] <= c["step"] <= bucket[-1]]
        points.append(
            {
                "step": int(bucket[-1]),
                "reward": float(reward[here].mean()),
                "judge": float(judge[here].mean()),
                "kl": _mean([c["kl"] for c in measured if "kl" in c]),
                "length": _mean([c["length"] for c in measured]),
                "rollouts": int(here.sum()),
            }
        )
    prompts = [str(r["prompt_id"]) for r in kept]
    return {"points": points, **parting(step_N, reward, judge, prompts, job.evaluate.bootstrap, job.seed)}


def _rewards(ppo: config.PPO, names: Sequence[str], rows: Sequence[Mapping[str, Any]], units_NA: Any) -> Any:
    """The objective's reward of each rollout, [N], as if `units_NA` had been reached."""
    from torch import tensor

    requested_NA = np.array([[float(r[f"requested_{n}"]) for n in names] for r in rows])
    reached = level_reward(tensor(units_NA), tensor(requested_NA), tensor([ppo.weights.get(n, 1.0) for n in names]))
    finished = tensor([r["finish_reason"] in schema.FINISHED for r in rows])
    return shaped_reward(reached, finished, clip=ppo.reward_clip, missing_eos_penalty=ppo.missing_eos_penalty).double().numpy()


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
