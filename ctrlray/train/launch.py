"""A loop on Ray Train's workers: how many, with what, how often they may fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctrlray.config import Optimization
from ctrlray.errors import ClusterError
from ctrlray.tables import Storage


def launch(
    loop: Callable[[dict[str, Any]], None], given: dict[str, Any], settings: Optimization, name: str, out: Storage, *, what: str
) -> None:
    """Run `loop(given)` on the workers that `settings` asks for, to its end.

    `name` must hold the hash of all that the loop reads: Ray Train silently resumes what it finds under a name. Raises
    ClusterError, beginning with `what`, when the workers failed more often than allowed.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = settings.gpus_per_worker > 0
    worker_env = {"TOKENIZERS_PARALLELISM": "false"} | ({} if gpu else {"DS_ACCELERATOR": "cpu"})
    trainer = TorchTrainer(
        loop,
        train_loop_config=given,
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": settings.gpus_per_worker} if gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=out.path("ray_train"),
            storage_filesystem=out.filesystem,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": worker_env},
        ),
    )
    result = trainer.fit()
    if result.error is not None:
        raise ClusterError(f"{what} failed {settings.max_failures + 1} times: {result.error}") from result.error
