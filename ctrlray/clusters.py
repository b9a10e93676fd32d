"""Cluster files as lists of nodes: Ray's launcher YAML and KubeRay's resources in, what each node type has and costs out.

Reads only; Ray and KubeRay check these files themselves. What an hour of a machine costs and what its GPUs are stands in a
file of prices, by the machine's type as the cloud names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ctrlray.config import Frozen, parse, read_job
from ctrlray.errors import ConfigError
from ctrlray.placement import Group, Node, takes, without

RAY_SHARE = 0.7
"""Of a node's memory that Ray gives to processes: by default it keeps 30% for its object store."""
PRICES = Path(str(resources.files("ctrlray") / "assets" / "prices.yaml"))
"""The prices that ship with ctrlray."""
_TYPE = "accelerator_type:"
"""How the resources of a Ray node name its kind of GPU."""
_MACHINE_LABEL, _SPOT_LABEL = "node.kubernetes.io/instance-type", "cloud.google.com/gke-spot"
_IDLE_MINUTES, _IDLE_SECONDS = 5.0, 60.0
"""What Ray's launcher and KubeRay's autoscaler wait where a file does not say."""
_OWN = ("CPU", "GPU", "memory", "object_store_memory")


class GPU(Frozen):
    """One kind of GPU, by its data sheet."""

    memory_gib: Annotated[float, Field(gt=0)]
    bf16_tflops: Annotated[float, Field(gt=0)]
    """Peak of dense bfloat16 products, 10^12 per second."""
    gb_per_s: Annotated[float, Field(gt=0)]
    """Memory bandwidth, 10^9 bytes per second."""


class Machine(Frozen):
    """One kind of machine."""

    cpus: Annotated[int, Field(ge=1)]
    memory_gib: Annotated[float, Field(gt=0)]
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu: str | None = None
    """Its kind of GPU."""
    dollars_per_hour: Annotated[float, Field(ge=0)]
    spot_dollars_per_hour: Annotated[float, Field(ge=0)] | None = None


class Prices(Frozen):
    """Assumptions about machines: edit them before money depends on them."""

    as_of: str
    """Month of the prices."""
    source: str
    gpus: dict[str, GPU]
    machines: dict[str, Machine]


class NodeType(NamedTuple):
    """Nodes alike that a cluster may have."""

    name: str
    node: Node
    machine: str
    gpu: str | None
    spot: bool
    least: int
    most: int
    dollars_per_hour: float


class Cluster(NamedTuple):
    """A cluster file: its head, the workers that it may have, and how many in all."""

    name: str
    head: NodeType
    workers: tuple[NodeType, ...]
    most: int
    """Workers at the same time, of all types together."""
    idle_s: float = 0.0
    """How long a worker that came up stays without work; 0 where none goes down."""

    def nodes(self) -> list[Node]:
        """All nodes when every type is at its most."""
        return [self.head.node, *(t.node for t in self.workers for _ in range(t.most))]


class Launched(NamedTuple):
    """Nodes that a phase brings up, the head aside."""

    counts: dict[str, int]
    dollars_per_hour: float


def read_prices(path: Path) -> Prices:
    """Raises ConfigError where the file is not one of prices."""
    return parse(Prices, read_job(path), where=str(path))


@cache
def known_gpus() -> Mapping[str, GPU]:
    """Kinds of GPU in the prices that ship with ctrlray."""
    return read_prices(PRICES).gpus


def gpu_gib(found: Iterable[str], gpus: Mapping[str, GPU]) -> float:
    """Memory of each GPU of a Ray node, by the kind among its resources; infinite where that is not known.

    Ray calls both kinds of A100 by one name, and launchers say A100-40G: the largest that it may be counts.
    """

    def of(kind: str) -> float:
        fitting = [g.memory_gib for name, g in gpus.items() if name in (kind, f"{kind}B") or name.startswith(f"{kind}-")]
        return max(fitting, default=math.inf)

    return max((of(name.removeprefix(_TYPE)) for name in found if name.startswith(_TYPE)), default=math.inf)


def read_cluster(path: Path, prices: Prices) -> Cluster:
    """A Ray launcher file, or a RayCluster, RayJob or RayService. Raises ConfigError, naming file, field and value."""
    raw = read_job(path)
    try:
        if "kind" in raw:
            return _kuberay(raw, prices)
        return _on_premise(raw, prices) if raw["provider"]["type"] == "local" else _launcher(raw, prices)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: no cluster file of Ray or KubeRay ({error!r} is missing or no mapping)") from error


def _launcher(raw: Mapping[str, Any], prices: Prices) -> Cluster:
    """AWS and GCP: `available_node_types` with the machine's type in `node_config`."""
    types = {}
    for name, given in raw["available_node_types"].items():
        settings = given["node_config"]
        machine = settings.get("InstanceType") or settings.get("machineType")
        market = settings.get("InstanceMarketOptions", {}).get("MarketType")
        spot = market == "spot" or any(s.get("preemptible") for s in settings.get("scheduling", []))
        is_head = name == raw["head_node_type"]
        most = 0 if is_head else given.get("max_workers", raw["max_workers"])
        where = f"available_node_types.{name}"
        types[name] = _node_type(name, machine, given["resources"], spot, given.get("min_workers", 0), most, prices, where)
    head = types.pop(raw["head_node_type"])
    idle_s = 60.0 * raw.get("idle_timeout_minutes", _IDLE_MINUTES)
    return Cluster(raw["cluster_name"], head, tuple(types.values()), raw["max_workers"], idle_s)


def _on_premise(raw: Mapping[str, Any], prices: Prices) -> Cluster:
    """Machines of one's own: Ray's file has their addresses only, what they are stands in `metadata.ctrlray`."""
    mine = raw["metadata"]["ctrlray"]
    resources, others = dict.fromkeys(mine["groups"], 1), len(raw["provider"]["worker_ips"])
    types = [
        _node_type(name, mine["machine"], resources, False, most, most, prices, "metadata.ctrlray.machine")
        for name, most in (("head", 0), ("worker", others))
    ]
    return Cluster(raw["cluster_name"], types[0], (types[1],), others)


def _kuberay(raw: Mapping[str, Any], prices: Prices) -> Cluster:
    spec = raw["spec"]
    spec = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    groups = tuple(_pods(g, prices) for g in spec["workerGroupSpecs"])
    scaling = spec.get("autoscalerOptions") or {}
    idle_s = float(scaling.get("idleTimeoutSeconds", _IDLE_SECONDS)) if spec.get("enableInTreeAutoscaling") else 0.0
    head = _pods(spec["headGroupSpec"], prices)
    return Cluster(raw["metadata"]["name"], head, groups, sum(g.most for g in groups), idle_s)


def _pods(group: Mapping[str, Any], prices: Prices) -> NodeType:
    """A group of pods. KubeRay writes custom resources as JSON with backslashes, in quotes of its own."""
    pod = group["template"]["spec"]
    limits, labels = pod["containers"][0]["resources"]["limits"], pod["nodeSelector"]
    custom = json.loads(group["rayStartParams"].get("resources", '"{}"')[1:-1].replace("\\", ""))
    resources = {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0)), **custom}
    memory = str(limits["memory"])
    if not memory.endswith("Gi"):
        raise ConfigError(f"resources.limits.memory={memory!r}: write it in Gi")
    name = group.get("groupName", "head")
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
    spot = labels.get(_SPOT_LABEL) == "true"
    made = _node_type(name, labels[_MACHINE_LABEL], resources, spot, least, most, prices, f"{name}: nodeSelector")
    return made._replace(node=made.node._replace(memory_gib=float(memory[:-2]) * RAY_SHARE))


def _node_type(
    name: str, machine: str, resources: Mapping[str, int], spot: bool, least: int, most: int, prices: Prices, where: str
) -> NodeType:
    if machine not in prices.machines:
        raise ConfigError(f"{where}: machine {machine!r} has no entry in the prices; add one under machines")
    facts = prices.machines[machine]
    if facts.gpu is not None and facts.gpu not in prices.gpus:
        raise ConfigError(f"machine {machine!r}: gpu {facts.gpu!r} has no entry in the prices; add one under gpus")
    if spot and facts.spot_dollars_per_hour is None:
        raise ConfigError(f"machine {machine!r} has no spot_dollars_per_hour in the prices, and {where} asks for spot")
    room = prices.gpus[facts.gpu].memory_gib if facts.gpu else math.inf
    node = Node(
        resources.get("CPU", facts.cpus),
        resources.get("GPU", facts.gpus),
        facts.memory_gib * RAY_SHARE,
        frozenset(k for k in resources if k not in _OWN),
        room,
    )
    dollars = facts.spot_dollars_per_hour if spot else facts.dollars_per_hour
    assert dollars is not None
    return NodeType(name, node, machine, facts.gpu, spot, least, most, dollars)


def launch(cluster: Cluster, groups: Sequence[Group]) -> Launched | ConfigError:
    """Nodes that the actors of a phase bring up, or the limit of the cluster file that they run into.

    As an autoscaler packs: largest actor first, onto what is up already, else onto a new node of the type on which one such
    actor costs least.
    """
    up: list[tuple[NodeType | None, Node]] = [(None, cluster.head.node)]
    up += [(t, t.node) for t in cluster.workers for _ in range(t.least)]
    for actor in _actors(groups):
        place = next((i for i, (_, n) in enumerate(up) if takes(n, actor)), None)
        if place is None:
            found = _cheapest(cluster, actor, [t for t, _ in up if t])
            if isinstance(found, ConfigError):
                return found
            up.append((found, found.node))
            place = len(up) - 1
        up[place] = (up[place][0], without(up[place][1], actor))
    brought = [t for t, _ in up if t]
    return Launched({t.name: brought.count(t) for t in dict.fromkeys(brought)}, sum(t.dollars_per_hour for t in brought))


def _actors(groups: Sequence[Group]) -> Iterator[Group]:
    """One by one, those with most GPUs first."""
    yield from sorted((g for g in groups for _ in range(g.actors)), key=lambda g: (g.gpus, g.cpus, g.memory_gib), reverse=True)


def _cheapest(cluster: Cluster, actor: Group, up: Sequence[NodeType]) -> NodeType | ConfigError:
    fitting = [t for t in cluster.workers if takes(t.node, actor)]
    free = [t for t in fitting if up.count(t) < t.most]
    if free and len(up) < cluster.most:
        return min(free, key=lambda t: t.dollars_per_hour / _fill(t.node, actor))
    if free:
        return ConfigError(f"{actor.operator} actors need more than max_workers={cluster.most} nodes; raise it")
    if fitting:
        limits = ", ".join(f"{t.name} ({t.most})" for t in fitting)
        return ConfigError(f"{actor.operator} actors need more nodes than their type may have: {limits}; raise that limit")
    return ConfigError(f"no node type takes {actor.operator} actors")


def _fill(node: Node, actor: Group) -> int:
    """Actors of this kind that an empty node takes."""
    count = 0
    while count < 1000 and takes(node, actor):
        node, count = without(node, actor), count + 1
    return count
