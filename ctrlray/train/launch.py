"""A loop on Ray Train's workers: how many, with what, how often they may fail, and a watch on how far it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from ctrlray.actors import last_line
from ctrlray.config import Optimization
from ctrlray.errors import ClusterError, CtrlRayError
from ctrlray.ledger import Progress
from ctrlray.patience import Background, Patience
from ctrlray.placement import on_nodes
from ctrlray.tables import Storage

_POLL_S = 1.0
_LOOK = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
"""How often Ray Train's controller takes what workers report. A worker that reports again before that waits, and so does the end
of a training; Ray's own 2 s are most of the time of a small one."""
MOST_STARTS = 100
"""How often worker groups may fail to start, a minute each, and nodes may be taken away; without it Ray tries for ever."""


def launch(
    loop: Callable[[dict[str, Any]], None], given: dict[str, Any], settings: Optimization, name: str, out: Storage, *, what: str
) -> None:
    """Run `loop(given)` on the workers that `settings` asks for, to its end.

    `name` must hold the hash of all that the loop reads: Ray Train silently resumes what it finds under a name. Raises what
    ctrlray itself refused in a worker, else a ClusterError that begins with `what`, when workers failed more often than allowed.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault(*_LOOK)
    gpu = settings.gpus_per_worker > 0
    worker_env = {"TOKENIZERS_PARALLELISM": "false"} | ({} if gpu else {"DS_ACCELERATOR": "cpu"})
    trainer = TorchTrainer(
        loop,
        train_loop_config=given,
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, **on_nodes(settings.nodes)}
            | ({"GPU": settings.gpus_per_worker} if gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=out.path("ray_train"),
            storage_filesystem=out.filesystem,
            failure_config=FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=MOST_STARTS, max_preemption_failures=MOST_STARTS
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": worker_env},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _told(error, what, settings.max_failures) from error


def _told(error: Exception, what: str, max_failures: int) -> CtrlRayError:
    """The error that a user reads of a training that failed for good."""
    failures = [*_failures(error)][::-1]
    for failure in failures:
        if isinstance(failure, CtrlRayError):
            return failure
    line, name = last_line(failures[0]), type(failures[0]).__name__
    named = line if line.startswith(name) else f"{name}: {line}"
    return ClusterError(
        f"{what} failed for good; it ended with: {named}. What is finished is kept: mend that, or lower micro_batch_tokens where "
        f"memory is short, or raise max_failures={max_failures} where nodes are lost, and run the same command again; it goes on "
        "from the last snapshot."
    )


def _failures(error: Exception) -> Iterator[Exception]:
    """An error and what lies behind it, which Ray Train wraps; last what the worker of the lowest rank failed with."""
    yield error
    ranks = getattr(error, "worker_failures", None) or {}
    of_workers = [ranks[rank] for rank in sorted(ranks, reverse=True)]
    behind = [getattr(error, name, None) for name in ("controller_failure", "health_check_failure", "cause")]
    for found in [*of_workers, *behind]:
        if isinstance(found, Exception):
            yield from _failures(found)


class Watch:
    """Reads the notes that rank 0 leaves of its steps and passes them on; `before` steps of other trainings count as done."""

    def __init__(self, name: str, place: Storage, progress: Progress, before: int = 0) -> None:
        self._name, self._place, self._progress, self._before = name, place, progress, before
        self.seen = 0
        """Steps noted so far; fewer than before when a failed worker went back to its checkpoint."""

    def look(self) -> None:
        """Pass on what is new."""
        if not self._place.exists("progress.json"):
            return
        now = self._place.read_json("progress.json")
        self._progress.total(self._before + now["steps"])
        if now["step"] == self.seen:
            return
        for point in now["recent"]:
            if point["step"] > self.seen:
                self._progress.measure(self._name, int(point["step"]), point)
        self._progress.advance(now["step"] - self.seen)
        self.seen = now["step"]


def watched(call: Callable[[], None], watch: Watch, patience: Patience) -> None:
    """Run `call` beside a watch on its steps: `fit` itself blocks, Ctrl-C included, until the end."""
    running = Background(call)
    seen, moved, over = 0, time.monotonic(), False
    while not over:
        over = running.over(_POLL_S)  # the last steps are read after the end
        watch.look()
        if watch.seen != seen:
            seen, moved = watch.seen, time.monotonic()
        if not over and time.monotonic() - moved > patience.timeout_s:
            raise patience.over()


def waits_for(place: Storage, settings: Optimization) -> str:
    """What training has not done yet: its next step, or to get its workers."""
    import ray

    if place.exists("progress.json"):
        now = place.read_json("progress.json")
        return f"step {now['step'] + 1} of {now['steps']}"
    free = ray.available_resources()
    wanted = f"{settings.workers} workers with {settings.cpus_per_worker:g} CPUs and {settings.gpus_per_worker:g} GPUs each"
    return f"{wanted}; {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free"
