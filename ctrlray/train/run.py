"""Train stage: examples in, one adapter and one merged model folder per objective out, by Ray Train's TorchTrainer."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from ctrlray import config, models
from ctrlray.control import ControlSpace
from ctrlray.errors import ClusterError, DataError
from ctrlray.ledger import Progress, StageResult
from ctrlray.models import PreparedBase
from ctrlray.placement import CONTROLLER_CPUS
from ctrlray.schema import digest
from ctrlray.tables import Storage
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
            with _Watch(place, progress):
                _fit(task, name, out)
        curves = place.read_json("curves.json")
        tokens += int(sum(p["tokens"] for p in curves))
        facts[objective.type] = {"steps": len(curves), "seconds": round(sum(p["seconds"] for p in curves), 1)}
    return StageResult(train + valid, train + valid, tokens=tokens, facts=facts)


class _Watch:
    """Reports a running objective's steps, which rank 0 notes beside its output: `fit` itself blocks until the end."""

    def __init__(self, place: Storage, progress: Progress) -> None:
        self._place, self._progress = place, progress
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        """Start watching."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def _poll(self) -> None:
        seen = 0
        while not self._over.wait(2.0):
            if self._place.exists("progress.json"):
                now = self._place.read_json("progress.json")
                self._progress.total(now["steps"])
                if now["step"] > seen:
                    self._progress.advance(now["step"] - seen)
                    seen = now["step"]


def _fit(task: TrainTask, name: str, out: Storage) -> None:
    """One TorchTrainer run. Its name holds the stage's key, because Ray Train silently resumes what it finds under a name."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    s = task.settings
    gpu = s.gpus_per_worker > 0
    worker_env = {"TOKENIZERS_PARALLELISM": "false"} | ({} if gpu else {"DS_ACCELERATOR": "cpu"})
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=s.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": s.cpus_per_worker} | ({"GPU": s.gpus_per_worker} if gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=out.path("ray_train"),
            storage_filesystem=out.filesystem,
            failure_config=FailureConfig(max_failures=s.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": worker_env},
        ),
    )
    result = trainer.fit()
    if result.error is not None:
        raise ClusterError(f"train: {task.objective.type} failed {s.max_failures + 1} times: {result.error}") from result.error


def _merge_task(base: str, adapter: Storage, out: str, dtype: str | None) -> str:
    from ctrlray.train.models import merge

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
