"""Placement as arithmetic: what each phase of a job reserves, and whether a cluster can take it.

Pure: a job, the shape of its model and a list of nodes in; groups of actors, or what is missing and the smallest change
that would fit, out. The memory of GPUs counts where a list of nodes gives it: a cluster file does, Ray names at most their kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ctrlray import config, memory
from ctrlray.errors import ConfigError
from ctrlray.memory import Shape
from ctrlray.schema import PROMPTS_PER_PART

WRITE_CPUS = 0.05
"""Logical CPUs of a score writer and of a request writer, which idle beside engines and rewards."""
_ENGINES_PER_WRITER = 32
CONTROLLER_CPUS = 0.1
"""Room for ctrlray's own small tasks, such as merging an adapter."""
GRADING, JUDGING = "evaluate: rewards", "evaluate: judges"
STAGES_OF = {
    "generate and score": ("generate", "score"),
    "train": ("train",),
    "train ppo": ("train",),
    "evaluate": ("evaluate", "export"),
    GRADING: ("evaluate",),
    JUDGING: ("evaluate",),
}
"""Stages that run a phase's actors."""
MERGE = "adapter merge"
_ON_NODES = 0.001
"""What an actor takes of the one unit that each node of a group has."""


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
    nodes: str | None = None
    """Group of nodes that they run on; None: any."""
    gpu_gib: float = 0.0
    """Memory of each of its GPUs, or of its share of one; what is not known counts as 0."""


class Node(NamedTuple):
    """Logical resources of one node."""

    cpus: float
    gpus: float
    memory_gib: float
    groups: frozenset[str] = frozenset()
    """Groups that it belongs to."""
    gpu_gib: float = math.inf
    """Memory of each of its GPUs; infinite when not known."""


def on_nodes(name: str | None) -> dict[str, float]:
    """Custom resources that keep an actor on the nodes of a group."""
    return {name: _ON_NODES} if name else {}


def plan(
    job: config.Job, shape: Shape | None = None, rewards: Mapping[str, int] | None = None, *, least: bool = True
) -> list[Group]:
    """What each phase runs at the same time: at `least`, or with pools at their largest.

    Engines and reward actors run together; training runs alone; the grid is scored when its engines are gone, by the rewards
    and then by judges. `rewards` has the parameters of reward models by name.
    """
    first, known = "generate and score", rewards or {}
    engines, scoring = job.generate.pool, job.score.pool
    scorers = scoring.min_size if least else scoring.max_size
    ppo = any(isinstance(o, config.PPO) for o in job.train.objectives)
    return [
        _engines(job, first, engines.min_size if least else engines.max_size, shape),
        *_expanding(job, first),
        *_scoring(job, first, job.teachers, scorers, known),
        _workers(job, "train", shape),
        *(_reinforcing(job, shape, known) if ppo else []),
        _engines(job, "evaluate", engines.max_size, shape),
        Group("evaluate", MERGE, 1, CONTROLLER_CPUS, 0.0, memory.SMALL_PROCESS_GIB),
        *_scoring(job, GRADING, job.teachers, scorers, known),
        *(_scoring(job, JUDGING, job.judges, scorers, known) if job.judges else []),
    ]


def _expanding(job: config.Job, phase: str) -> list[Group]:
    """Actors that render requests, where the prompts are more than the driver renders itself."""
    if job.prompts.train + job.prompts.eval <= PROMPTS_PER_PART:
        return []
    number = writers(job.generate.pool.max_size)
    return [Group(phase, "request writer", number, WRITE_CPUS, 0.0, memory.SMALL_PROCESS_GIB)]


def writers(engines: int) -> int:
    """How many actors write requests for so many engines, and as many their scores.

    Ray Data gives an actor two blocks ten times a second at most, however little each takes.
    """
    return 1 + engines // _ENGINES_PER_WRITER


def _scoring(
    job: config.Job, phase: str, rewards: Sequence[config.Reward], actors: int, known: Mapping[str, int]
) -> list[Group]:
    """Pools of rewards and the writers of what they say."""
    pools = [_reward(job, phase, r, actors, known) for r in rewards]
    number = writers(job.generate.pool.max_size)
    return [*pools, Group(phase, "score writer", number, WRITE_CPUS, 0.0, memory.SMALL_PROCESS_GIB)]


def _reinforcing(job: config.Job, shape: Shape | None, known: Mapping[str, int]) -> list[Group]:
    """Engines, rewards and workers of PPO, all up at the same time."""
    phase = "train ppo"
    return [
        _engines(job, phase, job.generate.pool.max_size, shape),
        *(_reward(job, phase, r, job.score.pool.max_size, known) for r in job.teachers),
        _workers(job, phase, shape),
    ]


def _engines(job: config.Job, phase: str, actors: int, shape: Shape | None) -> Group:
    pool = job.generate.pool
    host = memory.engine_host_gib(job, shape) if shape else 0.0
    device = memory.engine_gpu_gib(job, shape) if shape and pool.gpus else 0.0
    return Group(phase, "engine", actors, pool.cpus, pool.gpus * job.generate.engine.tensor_parallel, host, pool.nodes, device)


def _reward(job: config.Job, phase: str, reward: config.Reward, actors: int, known: Mapping[str, int]) -> Group:
    pool = job.score.pool
    runs_model = reward.type in ("embedded", "hf")
    host = memory.REWARD_PROCESS_GIB if runs_model else memory.SMALL_PROCESS_GIB
    weights = memory.reward_weights_gib(known.get(getattr(reward, "model", ""), 0), gpu=pool.gpus > 0)
    device = memory.CONTEXT_GIB + weights if runs_model and pool.gpus else 0.0
    who = f"{'judge' if reward.judge else 'reward'} {reward.type}"
    return Group(phase, who, actors, pool.cpus, pool.gpus, host + weights, pool.nodes, device)


def _workers(job: config.Job, phase: str, shape: Shape | None) -> Group:
    train = job.train
    host = memory.worker_host_gib(job, shape) if shape else 0.0
    device = memory.worker(job, shape).total if shape and train.gpus_per_worker else 0.0
    return Group(phase, "worker", train.workers, train.cpus_per_worker, train.gpus_per_worker, host, train.nodes, device)


def of_stage(groups: Sequence[Group], stage: str) -> list[Group]:
    """What a stage waits for, in all its phases: export merges an adapter and has no engine.

    Rewards of the grid were there beside generation, and may take the place of engines that are gone.
    """
    mine = [g for g in groups if stage in STAGES_OF[g.phase] and g.phase != GRADING]
    return [g for g in mine if g.operator == MERGE] if stage == "export" else mine


def bundles(groups: Sequence[Group]) -> list[dict[str, float]]:
    """The largest phase as resource bundles, for an autoscaler to make room for; of each group of nodes its own largest.

    An autoscaler starts nothing where it cannot hold all that is asked for, so phases that follow each other are not added up.
    """
    made = []
    for nodes in dict.fromkeys(g.nodes for g in groups):
        here = phases([g for g in groups if g.nodes == nodes]).values()
        largest = max(here, key=lambda p: (sum(g.actors * g.gpus for g in p), sum(g.actors * g.cpus for g in p)))
        made += [bundle(g) for g in largest for _ in range(g.actors)]
    return made


def bundle(group: Group) -> dict[str, float]:
    """What one actor of a group asks Ray for."""
    return {k: v for k, v in (("CPU", group.cpus), ("GPU", group.gpus)) if v} | on_nodes(group.nodes)


def misfit(
    job: config.Job,
    groups: Sequence[Group],
    nodes: Sequence[Node],
    shape: Shape | None = None,
    rewards: Mapping[str, int] | None = None,
) -> str | None:
    """What is missing for which phases, and the smallest change with which all of them fit; None when they do."""
    missing = [f"{name} {_missing(mine, nodes)}" for name, mine in phases(groups).items() if not packs(mine, nodes)]
    wanted = {(g.phase, g.operator) for g in groups}
    return f"{'; '.join(missing)}. {_advice(job, wanted, nodes, shape, rewards)}" if missing else None


def phases(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups that run at the same time, by phase."""
    return {g.phase: [h for h in groups if h.phase == g.phase] for g in groups}


def packs(groups: Sequence[Group], nodes: Sequence[Node]) -> bool:
    """Whether all actors find a node, largest first, each on the first node with room."""
    return unplaced(groups, list(nodes)) is None


def unplaced(groups: Sequence[Group], nodes: list[Node]) -> Group | None:
    """Take the actors' resources from `nodes`, largest actor first; the first actor that finds none, as a group of one."""
    for actor in sorted((g for g in groups for _ in range(g.actors)), key=_size, reverse=True):
        place = next((i for i, n in enumerate(nodes) if takes(n, actor)), None)
        if place is None:
            return actor._replace(actors=1)
        nodes[place] = without(nodes[place], actor)
    return None


def takes(node: Node, actor: Group) -> bool:
    """Whether a node has room for one actor: of its group, in all resources, and in each GPU's memory."""
    if actor.nodes is not None and actor.nodes not in node.groups:
        return False
    share = min(actor.gpus, 1.0) if actor.gpus else 1.0
    fits = all(want <= have + 1e-6 for want, have in zip(_amounts(actor), node[:3], strict=True))
    return fits and actor.gpu_gib <= node.gpu_gib * share + 1e-6


def without(node: Node, actor: Group) -> Node:
    """What is left of a node beside one actor."""
    cpus, gpus, gib = (have - want for have, want in zip(node[:3], _amounts(actor), strict=True))
    return node._replace(cpus=cpus, gpus=gpus, memory_gib=gib)


def _size(actor: Group) -> tuple[bool, float, float, float]:
    """Actors that may run on few nodes go first, then those that need most."""
    return (actor.nodes is not None, actor.gpus, actor.memory_gib, actor.cpus)


def _amounts(group: Group) -> tuple[float, float, float]:
    """What one actor of a group takes: CPUs, GPUs, GiB."""
    return group.cpus, group.gpus, group.memory_gib


def _missing(groups: Sequence[Group], nodes: Sequence[Node]) -> str:
    """The amounts that are short in all, or in a group of nodes; else the actor that no node takes, or that they do not pack."""
    for name in [None, *sorted({g.nodes for g in groups if g.nodes})]:
        mine = [g for g in groups if name in (None, g.nodes)]
        there = [n for n in nodes if name is None or name in n.groups]
        if short := _short(mine, there, f"group {name!r} of its nodes" if name else "the cluster"):
            return short
    for g in groups:
        if not packs([g._replace(actors=1)], nodes):
            return _too_large(g, nodes)
    return f"does not pack onto the {len(nodes)} nodes, though their sum suffices"


def _short(groups: Sequence[Group], nodes: Sequence[Node], where: str) -> str:
    short = []
    for i, kind in enumerate(("CPUs", "GPUs", "GiB of memory")):
        need = sum(g.actors * _amounts(g)[i] for g in groups)
        have = sum(n[:3][i] for n in nodes)
        if need > have + 1e-6:
            short.append(f"needs {_text(need)} {kind}, {where} has {_text(have)}: {_text(need - have)} too few")
    return "; ".join(short)


def _too_large(group: Group, nodes: Sequence[Node]) -> str:
    """Why no node takes one actor."""
    who = f"has {group.operator} actors"
    if packs([group._replace(actors=1, gpu_gib=0.0)], nodes):
        most = max(n.gpu_gib for n in nodes if takes(n, group._replace(gpu_gib=0.0)))
        return f"{who} that need {group.gpu_gib:.1f} GiB of each GPU, which has {most:.1f}"
    one = f"{group.cpus:g} CPUs, {group.gpus:g} GPUs and {group.memory_gib:.1f} GiB"
    where = f"any node of group {group.nodes!r} has" if group.nodes else "any node has"
    return f"{who} of {one}, more than {where}"


def _text(amount: float) -> str:
    """Two decimals, rounded up, so that a shortage never reads as none."""
    return f"{math.ceil(amount * 100 - 1e-6) / 100:g}"


def _advice(
    job: config.Job,
    wanted: set[tuple[str, str]],
    nodes: Sequence[Node],
    shape: Shape | None,
    rewards: Mapping[str, int] | None,
) -> str:
    def planned(job: config.Job) -> list[Group]:
        return [g for g in plan(job, shape, rewards) if (g.phase, g.operator) in wanted]

    for changes in _smaller(job):
        made = changed(job, changes)
        if made is not None and all(packs(mine, nodes) for mine in phases(planned(made)).values()):
            return f"The smallest change that fits: {', '.join(f'{k}={_value(v)}' for k, v in changes.items())}. Or add nodes."
    groups = planned(job)
    most = [max(_amounts(g)[i] for g in groups) for i in range(3)]
    device = max(g.gpu_gib for g in groups)
    of = f" of {device:.1f} GiB each" if device else ""
    return f"No smaller pool fits: add a node with at least {most[0]:g} CPUs, {most[1]:g} GPUs{of} and {most[2]:.1f} GiB."


def _value(value: Any) -> str:
    """As `--set` takes it."""
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value).lower()


def _smaller(job: config.Job) -> Iterator[Mapping[str, Any]]:
    """Changes to try, smallest first: fewer actors, then less CPU each, then less memory, then any nodes for them."""
    yield from _fewer(job)
    yield from _leaner(job)
    placed = {"generate.pool": job.generate.pool.nodes, "score.pool": job.score.pool.nodes, "train": job.train.nodes}
    if any(placed.values()):
        yield {f"{path}.nodes": None for path, name in placed.items() if name}


def _fewer(job: config.Job) -> Iterator[Mapping[str, Any]]:
    """Fewer of one kind of actor, then one of each, then less CPU for each."""
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
    ones: dict[str, Any] = {name: 1 for name, now in counts.items() if now > 1}
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


def _leaner(job: config.Job) -> Iterator[Mapping[str, Any]]:
    """Less memory for each worker, then for each GPU of an engine."""
    train, ranks = job.train, job.generate.engine.tensor_parallel
    tokens = train.micro_batch_tokens // 2
    while tokens >= 64:
        yield {"train.micro_batch_tokens": tokens}
        tokens //= 2
    spared: dict[str, Any] = {} if train.activation_checkpointing else {"train.activation_checkpointing": True}
    if spared:
        yield spared
    if train.zero_stage < 3 and train.workers > 1:
        yield {"train.zero_stage": 3}
        spared |= {"train.zero_stage": 3}
        yield spared
    if train.gpus_per_worker and train.offload == "none":
        yield spared | {"train.offload": "optimizer", "train.zero_stage": max(train.zero_stage, 1)}
        yield spared | {"train.offload": "all", "train.zero_stage": 3}
    for times in (2, 4, 8) if job.generate.pool.gpus else ():
        more = {"generate.engine.tensor_parallel": ranks * times}
        yield more
        yield more | {"generate.pool.max_size": 1, "generate.pool.min_size": 1}


def changed(job: config.Job, changes: Mapping[str, Any]) -> config.Job | None:
    """The job with other settings, by dotted name; None when it would not be valid."""
    raw = job.model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = raw
        for part in parents:
            node = node[part]
        node[last] = value
    try:
        return config.parse(config.Job, raw, where="plan")
    except ConfigError:
        return None
