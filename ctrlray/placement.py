"""Placement as arithmetic: what each phase of a job reserves at least, and whether a cluster can hold it."""

from __future__ import annotations

from typing import NamedTuple

from ctrlray import config
from ctrlray.errors import ClusterError

WRITE_CPUS = 0.05
"""Logical CPUs of the score writer, which idles beside engines and rewards."""
CONTROLLER_CPUS = 0.1
"""Room for ctrlray's own small tasks, such as merging an adapter."""


class Need(NamedTuple):
    """Logical resources that must be free at the same time."""

    phase: str
    cpus: float
    gpus: float
    setting: str
    """What to lower when it does not fit."""


def needs(job: config.Job) -> list[Need]:
    """The least that each phase reserves. Engines and reward actors run together; training runs alone."""
    engines = job.generate.pool
    rewards = job.score.pool
    engine_gpus = engines.min_size * engines.gpus * job.generate.engine.tensor_parallel
    reward_pools = rewards.min_size * len(job.rewards)
    train = job.train
    return [
        Need(
            "generate and score",
            engines.min_size * engines.cpus + reward_pools * rewards.cpus + WRITE_CPUS,
            engine_gpus + reward_pools * rewards.gpus,
            "generate.pool or score.pool",
        ),
        Need("train", train.workers * train.cpus_per_worker, train.workers * train.gpus_per_worker, "train.workers"),
        Need(
            "evaluate",
            engines.max_size * engines.cpus + CONTROLLER_CPUS,
            engines.max_size * engines.gpus * job.generate.engine.tensor_parallel,
            "generate.pool.max_size",
        ),
    ]


def check(job: config.Job, cpus: float, gpus: float) -> None:
    """Raise ClusterError naming phase, missing amount and setting, before any actor starts."""
    for need in needs(job):
        for kind, wanted, there in (("CPUs", need.cpus, cpus), ("GPUs", need.gpus, gpus)):
            if wanted > there + 1e-6:
                raise ClusterError(
                    f"{need.phase} reserves {wanted:g} {kind}, the cluster has {there:g}: {wanted - there:g} too few. "
                    f"Lower {need.setting}, or add nodes."
                )
