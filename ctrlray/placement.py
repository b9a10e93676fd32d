"""Placement as arithmetic: what each phase of a job reserves and holds in memory, and whether a cluster can take it.

Pure: a job, the shape of its model and a list of nodes in; groups of actors, or what is missing and the smallest change
that would fit, out. Memory counts where actors run on processors; a GPU's own memory is not known to Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ctrlray import config
from ctrlray.errors import ConfigError

WRITE_CPUS = 0.05
"""Logical CPUs of the score writer, which idles beside engines and rewards."""
CONTROLLER_CPUS = 0.1
"""Room for ctrlray's own small tasks, such as merging an adapter."""
ENGINE_PROCESS_GIB, WORKER_PROCESS_GIB, SMALL_PROCESS_GIB = 1.5, 1.2, 0.3
"""Resident memory of a process with vLLM, with torch and DeepSpeed, and with Ray alone, before any model is loaded."""
ALLOCATOR_SHARE = 2.0
LOGITS_AT_ONCE = 2**23
"""Output logits of a training step that exist at the same time."""
ADAM_BYTES, MASTER_BYTES, GRADIENT_BYTES = 8, 4, 4
BYTES = {"float32": 4, "bfloat16": 2}
_GIB = 2.0**30


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory."""

    parameters: int
    layers: int
    hidden: int
    linear: int
    """Sum over the linear layers of one block of inputs + outputs: a LoRA of rank r has r times that, per block."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Shape:
        """From a transformers config of the Llama family (Qwen, Gemma, Mistral, SmolLM): gated MLP, grouped attention.

        Raises KeyError when a size is not named.
        """
        hidden, layers, heads = settings["hidden_size"], settings["num_hidden_layers"], settings["num_attention_heads"]
        size = settings.get("head_dim") or hidden // heads
        values = (settings.get("num_key_value_heads") or heads) * size
        inner, vocabulary = settings["intermediate_size"], settings["vocab_size"]
        sides = [(hidden, heads * size), (hidden, values), (hidden, values), (heads * size, hidden)]
        sides += [(hidden, inner), (hidden, inner), (inner, hidden)]
        block = sum(a * b for a, b in sides) + 2 * hidden
        tables = vocabulary * hidden * 2  # the prepared base unties them
        return cls(layers * block + tables + hidden, layers, hidden, sum(a + b for a, b in sides))


class Group(NamedTuple):
    """Actors alike that one operator runs at the same time."""

    phase: str
    operator: str
    actors: int
    cpus: float
    """Logical CPUs of each."""
    gpus: float
    memory_gib: float
    """Resident memory of each on its node; what is not known counts as 0."""


class Node(NamedTuple):
    """Logical resources of one node."""

    cpus: float
    gpus: float
    memory_gib: float


def plan(job: config.Job, shape: Shape | None = None) -> list[Group]:
    """The least that each phase runs at the same time. Engines and reward actors run together; training runs alone."""
    engines, rewards, train = job.generate.pool, job.score.pool, job.train
    engine = (engines.cpus, engines.gpus * job.generate.engine.tensor_parallel, _engine_gib(job, shape))
    worker = (train.cpus_per_worker, train.gpus_per_worker, worker_gib(train, shape, job.model.dtype))
    first = "generate and score"
    ppo = next((o for o in train.objectives if isinstance(o, config.PPO)), None)
    pool = (rewards.min_size, rewards.cpus, rewards.gpus)
    scoring = [Group(first, f"reward {r.type}", *pool, _reward_gib(r)) for r in job.teachers]
    return [
        Group(first, "engine", engines.min_size, *engine),
        *scoring,
        Group(first, "score writer", 1, WRITE_CPUS, 0.0, SMALL_PROCESS_GIB),
        Group("train", "worker", train.workers, *worker),
        *(_reinforcing(job, engine, worker) if ppo else []),
        Group("evaluate", "engine", engines.max_size, *engine),
        Group("evaluate", "adapter merge", 1, CONTROLLER_CPUS, 0.0, SMALL_PROCESS_GIB),
        *_judging(job, pool),
    ]


def _judging(job: config.Job, pool: tuple[int, float, float]) -> list[Group]:
    """Judges, which score when the engines are gone."""
    judges = [Group("evaluate: judges", f"judge {r.type}", *pool, _reward_gib(r)) for r in job.judges]
    writer = Group("evaluate: judges", "score writer", 1, WRITE_CPUS, 0.0, SMALL_PROCESS_GIB)
    return [*judges, writer] if judges else []


def _reinforcing(job: config.Job, engine: tuple[float, float, float], worker: tuple[float, float, float]) -> list[Group]:
    """Engines, rewards and workers of PPO, all up at the same time."""
    rewards, phase = job.score.pool, "train ppo"
    pool = (rewards.max_size, rewards.cpus, rewards.gpus)
    return [
        Group(phase, "engine", job.generate.pool.max_size, *engine),
        *(Group(phase, f"reward {r.type}", *pool, _reward_gib(r)) for r in job.teachers),
        Group(phase, "worker", job.train.workers, *worker),
    ]


def _engine_gib(job: config.Job, shape: Shape | None) -> float:
    """Weights, KV cache and the process; on a GPU the first two lie there and pass through host memory once."""
    if shape is None:
        return 0.0
    weights = shape.parameters * BYTES[_widest(job.model.dtype)] / _GIB
    cache = 0 if job.generate.pool.gpus else job.generate.engine.kv_cache_gib
    return ENGINE_PROCESS_GIB + weights + cache


def _reward_gib(reward: config.Reward) -> float:
    return WORKER_PROCESS_GIB if reward.type in ("embedded", "hf") else SMALL_PROCESS_GIB


def worker_gib(train: config.Train, shape: Shape | None, dtype: str = "auto") -> float:
    """Host memory of one training worker in GiB.

    Weights, gradients and Adam's moments of what trains (sharded by ZeRO: optimizer from stage 1, gradients from 2, weights
    from 3); activations of one micro batch (Korthikanti et al. 2022, arXiv 2205.05198, eq. 1 without its attention weights,
    which are computed again: 34 bytes per block, token and channel at 2 bytes a value; with checkpointing the blocks' inputs
    and one block's activations), twice, because an allocator keeps what batches of other sizes left; a chunk of logits.
    """
    if shape is None:
        return 0.0
    if train.gpus_per_worker:  # all of it lies on the GPU; the host holds the weights once, while they load
        return WORKER_PROCESS_GIB + shape.parameters * 2 / _GIB
    wide = BYTES[_widest(dtype)] if train.lora else 4
    trained = shape.layers * shape.linear * train.lora.rank if train.lora else shape.parameters
    ranks, stage = train.workers, train.zero_stage
    weights = shape.parameters * wide / (ranks if stage == 3 else 1)
    masters = MASTER_BYTES if train.lora else 0  # full fine-tuning trains the float32 weights themselves
    states = trained * (ADAM_BYTES / (ranks if stage else 1) + GRADIENT_BYTES / (ranks if stage > 1 else 1) + masters)
    per_token = 17 + shape.layers if train.activation_checkpointing else 17 * shape.layers
    activations = per_token * train.micro_batch_tokens * shape.hidden * wide
    logits = LOGITS_AT_ONCE * (2 * wide + 4)
    return WORKER_PROCESS_GIB + (weights + states + ALLOCATOR_SHARE * activations + logits) / _GIB


def _widest(dtype: str) -> str:
    """`auto` is decided on the node that runs; the larger of its two answers is planned with."""
    return "float32" if dtype == "auto" else dtype


def bundles(groups: Sequence[Group]) -> list[dict[str, float]]:
    """The largest phase as resource bundles, for an autoscaler to make room for."""
    largest = max(phases(groups).values(), key=lambda p: (sum(g.actors * g.gpus for g in p), sum(g.actors * g.cpus for g in p)))
    return [{k: v for k, v in (("CPU", g.cpus), ("GPU", g.gpus)) if v} for g in largest for _ in range(g.actors)]


def misfit(job: config.Job, groups: Sequence[Group], nodes: Sequence[Node], shape: Shape | None = None) -> str | None:
    """What is missing for which phases, and the smallest change with which all of them fit; None when they do."""
    missing = [f"{name} {_missing(mine, nodes)}" for name, mine in phases(groups).items() if not packs(mine, nodes)]
    return f"{'; '.join(missing)}. {_advice(job, nodes, shape)}" if missing else None


def phases(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups that run at the same time, by phase."""
    return {g.phase: [h for h in groups if h.phase == g.phase] for g in groups}


def packs(groups: Sequence[Group], nodes: Sequence[Node]) -> bool:
    """Whether all actors find a node, largest first, each on the first node with room."""
    actors = sorted((g for g in groups for _ in range(g.actors)), key=lambda g: (g.gpus, g.memory_gib, g.cpus), reverse=True)
    free = [list(n) for n in nodes]
    for actor in actors:
        wanted = _amounts(actor)
        room = next((f for f in free if all(w <= r + 1e-6 for w, r in zip(wanted, f, strict=True))), None)
        if room is None:
            return False
        for i, amount in enumerate(wanted):
            room[i] -= amount
    return True


def _amounts(group: Group) -> Node:
    """What one actor of a group takes."""
    return Node(group.cpus, group.gpus, group.memory_gib)


def _missing(groups: Sequence[Group], nodes: Sequence[Node]) -> str:
    """The amounts that are short in all; else the actor that no single node can take, or that they do not pack."""
    short = []
    for i, kind in enumerate(("CPUs", "GPUs", "GiB of memory")):
        need = sum(g.actors * _amounts(g)[i] for g in groups)
        have = sum(n[i] for n in nodes)
        if need > have + 1e-6:
            short.append(f"needs {_text(need)} {kind}, the cluster has {_text(have)}: {_text(need - have)} too few")
    if short:
        return "; ".join(short)
    for g in groups:
        if not packs([g._replace(actors=1)], nodes):
            one = f"{g.cpus:g} CPUs, {g.gpus:g} GPUs and {g.memory_gib:.1f} GiB"
            return f"has {g.operator} actors of {one}, more than any node has"
    return f"does not pack onto the {len(nodes)} nodes, though their sum suffices"


def _text(amount: float) -> str:
    """Two decimals, rounded up, so that a shortage never reads as none."""
    return f"{math.ceil(amount * 100 - 1e-6) / 100:g}"


def _advice(job: config.Job, nodes: Sequence[Node], shape: Shape | None) -> str:
    for changes in _smaller(job):
        made = _changed(job, changes)
        if made is not None and all(packs(mine, nodes) for mine in phases(plan(made, shape)).values()):
            return f"The smallest change that fits: {', '.join(f'{k}={v:g}' for k, v in changes.items())}. Or add nodes."
    most = [max(_amounts(g)[i] for g in plan(job, shape)) for i in range(3)]
    return f"No smaller pool fits: add a node with at least {most[0]:g} CPUs, {most[1]:g} GPUs and {most[2]:.1f} GiB."


def _smaller(job: config.Job) -> Iterator[Mapping[str, float]]:
    """Changes to try, smallest first: fewer of one thing, then one of everything, then less CPU each, then less memory."""
    engines, rewards, train = job.generate.pool, job.score.pool, job.train
    for step in range(1, max(engines.max_size, rewards.min_size, train.workers)):
        if train.workers > step:
            yield {"train.workers": train.workers - step}
        if rewards.min_size > step:
            yield {"score.pool.min_size": rewards.min_size - step}
        if engines.min_size > step:
            yield {"generate.pool.min_size": engines.min_size - step}
        if engines.max_size > step:
            most = engines.max_size - step
            yield {"generate.pool.max_size": most} | ({"generate.pool.min_size": most} if most < engines.min_size else {})
    counts = {
        "train.workers": train.workers,
        "generate.pool.max_size": engines.max_size,
        "generate.pool.min_size": engines.min_size,
        "score.pool.min_size": rewards.min_size,
    }
    ones: dict[str, float] = {name: 1 for name, now in counts.items() if now > 1}
    if ones:
        yield ones
    for share in (0.5, 0.25, 0.1):
        for name, now in (
            ("generate.pool.cpus", engines.cpus),
            ("score.pool.cpus", rewards.cpus),
            ("train.cpus_per_worker", train.cpus_per_worker),
        ):
            yield {name: now * share}
            if ones:
                yield {name: now * share} | ones
    tokens = train.micro_batch_tokens // 2
    while tokens >= 64:
        yield {"train.micro_batch_tokens": tokens}
        tokens //= 2


def _changed(job: config.Job, changes: Mapping[str, float]) -> config.Job | None:
    raw = job.model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = raw
        for part in parents:
            node = node[part]
        node[last] = int(value) if isinstance(node[last], int) else value
    try:
        return config.parse(config.Job, raw, where="plan")
    except ConfigError:
        return None
