"""Train stage: examples in, one adapter and one merged model folder per objective out, by Ray Train's TorchTrainer."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import ray

from ctrlray import config, models
from ctrlray.control import ControlSpace
from ctrlray.distill import Levels as LevelScale
from ctrlray.engine.engine import EngineSpec
from ctrlray.engine.transfer import BACKEND
from ctrlray.errors import DataError
from ctrlray.ledger import Progress, StageResult
from ctrlray.models import PreparedBase
from ctrlray.patience import Patience
from ctrlray.placement import CONTROLLER_CPUS
from ctrlray.schema import digest
from ctrlray.tables import Storage, written
from ctrlray.train.launch import Watch, launch, waits_for, watched
from ctrlray.train.ppo import drive as ppo
from ctrlray.train.ppo.loop import PPOTask
from ctrlray.train.worker import TrainTask, train_loop, valid_and_train_counts


class Reinforcement(NamedTuple):
    """What reinforcement learning reads beside the job."""

    prompts: list[dict[str, Any]]
    scales: Mapping[str, LevelScale]
    spec: EngineSpec
    start: Callable[[config.PPO], str]
    """Folder of the model that it starts from; the objectives before it are trained by then."""


def run(
    examples: pa.Table,
    source: Storage,
    job: config.Job,
    base: PreparedBase,
    reinforcement: Reinforcement,
    out: Storage,
    key: str,
    progress: Progress,
) -> StageResult:
    """Train every objective of the job that `out` lacks, each from the prepared base; PPO from where it says.

    Rows are examples; those go out that workers saw. PPO has rollouts of its own, which are accounted for among the facts.
    """
    valid, train = valid_and_train_counts(examples)
    if not train:
        if valid:
            raise DataError(f"train: all {valid} examples are held out; lower distill.valid_fraction or add prompts")
        raise DataError("train: no training examples; lower distill.outer or add prompts or samples")
    progress.total(0)
    tokens, before = 0, 0
    seen = []
    facts: dict[str, Any] = {"workers": job.train.workers, "zero_stage": job.train.zero_stage}
    for objective in job.train.objectives:
        place = out.sub(objective.type)
        name = f"{objective.type}-{digest(key, objective.model_dump())}"
        if not place.exists("done.json"):
            if isinstance(objective, config.PPO):
                _reinforce(objective, job, base, reinforcement, place, key, name, out, progress, before)
            else:
                _learn(objective, job, base, source, place, key, name, out, progress, before)
        curves, note = place.read_json("curves.json"), place.read_json("done.json")
        before += len(curves)
        own = int(sum(p["tokens"] for p in curves))
        tokens += own
        facts[objective.type] = {
            "steps": len(curves),
            "seconds": round(sum(p["seconds"] for p in curves), 1),
            "tokens": own,
            "path": note.get("path"),
        }
        if isinstance(objective, config.PPO):
            facts[objective.type] |= ppo.accounts(place, [a.name for a in job.control.attributes])
        else:
            seen.append(int(note.get("examples", examples.num_rows)))  # notes of before have none
            facts[objective.type]["examples"] = seen[-1]
    farthest = max(seen, key=lambda rows: abs(rows - examples.num_rows), default=examples.num_rows)
    return StageResult(examples.num_rows, farthest, tokens=tokens, facts=facts)


def _dtype(job: config.Job) -> str:
    return models.pick_dtype(job.model.dtype, gpu=job.train.gpus_per_worker > 0)


def _learn(
    objective: config.Likelihood,
    job: config.Job,
    base: PreparedBase,
    source: Storage,
    place: Storage,
    key: str,
    name: str,
    out: Storage,
    progress: Progress,
    before: int,
) -> None:
    progress.note(f"training {objective.type}")
    task = TrainTask(
        base=base,
        space=ControlSpace.of(job.control),
        objective=objective,
        settings=job.train,
        examples=source,
        out=place,
        dtype=_dtype(job),
        seed=job.train_seed,
        key=key,
    )
    patience = Patience("train", job.cluster.stall_timeout_s, partial(waits_for, place, job.train))
    fit = partial(launch, train_loop, {"task": task}, job.train, name, out, what=f"train: {objective.type}")
    watched(fit, Watch(objective.type, place, progress, before), patience)


def _reinforce(
    objective: config.PPO,
    job: config.Job,
    base: PreparedBase,
    given: Reinforcement,
    place: Storage,
    key: str,
    name: str,
    out: Storage,
    progress: Progress,
    before: int,
) -> None:
    folder = given.start(objective)
    renderer = base.renderer(ControlSpace.of(job.control))
    task = PPOTask(
        folder=folder,
        base=base.folder,
        learned=None if objective.start == "base" else out.sub(objective.start),
        control_ids=base.control_ids,
        space=ControlSpace.of(job.control),
        objective=_with_critic(objective, job),
        settings=job.train,
        out=place,
        dtype=_dtype(job),
        seed=job.train_seed,
        key=key,
        pad_id=renderer.tokenizer.pad_token_id or renderer.tokenizer.eos_token_id or 0,
        timeout_s=job.cluster.stall_timeout_s,
        transfer=job.transfer(objective),
    )
    backend = BACKEND if task.transfer == "nccl" else None
    spec = replace(given.spec, model=folder, processed_logprobs=True, log_stats=True, transfer=backend)
    ppo.train(task, job, spec, given.prompts, given.scales, renderer, name, out, progress, before)


def _with_critic(objective: config.PPO, job: config.Job) -> config.PPO:
    """The objective with the model of its critic, if it names one, as a folder. Raises ConfigError when it cannot be used."""
    for setting, name in job.critics.items():  # a job reinforces once
        folder = str(models.resolve(config.Model(name=name), setting))
        objective = objective.model_copy(update={"critic": objective.critic.model_copy(update={"model": folder})})
    return objective


def _merge_task(base: str, adapter: Storage, out: str, dtype: str | None) -> str:
    from ctrlray.adapter import merge

    made = _unfinished(Path(out))
    with written(out):
        with tempfile.TemporaryDirectory() as scratch:
            for name in adapter.names():
                Path(scratch, name).write_bytes(adapter.read_bytes(name))
            merge(base, scratch, str(made), dtype)
        models.publish(made, Path(out))
    return out


def _unfinished(out: Path) -> Path:
    """A place beside `out` for this process to work in; what killed processes of this host left in theirs is deleted."""
    mine = f"{out.name}.tmp-{socket.gethostname()}-"
    for left in out.parent.glob(f"{glob.escape(mine)}*"):
        pid = left.name.removeprefix(mine)
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    return out.with_name(f"{mine}{os.getpid()}")


def merged_folder(base: str, trained: Storage, out: str, timeout_s: float, dtype: str | None = None) -> str:
    """A model folder at `out` with the adapter merged into the folder that training started from; made once.

    Raises ClusterError when that takes longer than `timeout_s`.
    """
    if Path(out).is_dir():
        return out
    with written(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    task = ray.remote(_merge_task).options(num_cpus=CONTROLLER_CPUS).remote(base, trained.sub("adapter"), out, dtype)
    try:
        return str(ray.get(task, timeout=timeout_s))
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(task, force=True)
        waits_for = f"the merge of {trained.uri}/adapter into {out} ({ray.available_resources().get('CPU', 0):g} CPUs are free)"
        raise Patience("train", timeout_s, lambda: waits_for).over() from error
