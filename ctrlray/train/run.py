"""Train stage: examples in, one adapter and one merged model folder per objective out, by Ray Train's TorchTrainer."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from ctrlray import config, models
from ctrlray.control import ControlSpace
from ctrlray.errors import DataError
from ctrlray.ledger import Progress, StageResult
from ctrlray.models import PreparedBase
from ctrlray.patience import Patience
from ctrlray.placement import CONTROLLER_CPUS
from ctrlray.schema import digest
from ctrlray.tables import Storage
from ctrlray.train.launch import launch, waits_for, watched
from ctrlray.train.worker import TrainTask, train_loop, valid_and_train_counts


def run(
    examples: pa.Table, source: Storage, job: config.Job, base: PreparedBase, out: Storage, key: str, progress: Progress
) -> StageResult:
    """Train every objective of the job that `out` lacks, each from the prepared base."""
    valid, train = valid_and_train_counts(examples)
    if not train:
        raise DataError("train: no training examples; lower distill.outer or add prompts or samples")
    progress.total(0)
    tokens = 0
    facts: dict[str, Any] = {"workers": job.train.workers, "zero_stage": job.train.zero_stage}
    for objective in job.train.objectives:
        assert not isinstance(objective, config.PPO)
        place = out.sub(objective.type)
        name = f"{objective.type}-{digest(key, objective.model_dump())}"
        if not place.exists("done.json"):
            progress.note(f"training {objective.type}")
            task = TrainTask(
                base=base,
                space=ControlSpace.of(job.control),
                objective=objective,
                settings=job.train,
                examples=source,
                out=place,
                dtype=models.pick_dtype(job.model.dtype, gpu=job.train.gpus_per_worker > 0),
                seed=job.seed,
                key=key,
            )
            patience = Patience("train", job.cluster.stall_timeout_s, partial(waits_for, place, job.train))
            watched(objective.type, partial(_fit, task, name, out), place, progress, patience)
        curves = place.read_json("curves.json")
        tokens += int(sum(p["tokens"] for p in curves))
        facts[objective.type] = {
            "steps": len(curves),
            "seconds": round(sum(p["seconds"] for p in curves), 1),
            "path": place.read_json("done.json").get("path"),
        }
    return StageResult(train + valid, train + valid, tokens=tokens, facts=facts)


def _fit(task: TrainTask, name: str, out: Storage) -> None:
    launch(train_loop, {"task": task}, task.settings, name, out, what=f"train: {task.objective.type}")


def _merge_task(base: str, adapter: Storage, out: str, dtype: str | None) -> str:
    from ctrlray.adapter import merge

    with tempfile.TemporaryDirectory() as scratch:
        for name in adapter.names():
            Path(scratch, name).write_bytes(adapter.read_bytes(name))
        made = f"{out}.tmp-{os.getpid()}"
        merge(base, scratch, made, dtype)
        os.replace(made, out)
    return out


def merged_folder(base: PreparedBase, trained: Storage, out: str, dtype: str | None = None) -> str:
    """A model folder at `out` with the adapter merged into the prepared base; made once."""
    if not Path(out).is_dir():
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        done: Any = ray.get(
            ray.remote(_merge_task).options(num_cpus=CONTROLLER_CPUS).remote(base.folder, trained.sub("adapter"), out, dtype)
        )
        return str(done)
    return out
