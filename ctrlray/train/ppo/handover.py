"""How weights get from the trainer into the engines without a file: who asks for them, when they go, what proves them.

    driver   1-request.json ─► trainer, while it waits for rollouts
             engines ◄──────── 1-offer.json: version, address, names, shapes
             engines ◄═ NCCL ═ rank 0, a layer at a time
             proof   ◄──────── 1-sent.json: sums of the probes as they were sent

A request comes before rollouts that need newer weights, and when an engine took another's place.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ctrlray.adapter import tensor_names
from ctrlray.engine.pool import EnginePool, Sync
from ctrlray.engine.probes import Expected, Given
from ctrlray.engine.transfer import Offer, Ranks
from ctrlray.errors import ClusterError, ConfigError
from ctrlray.tables import Storage
from ctrlray.train.ppo.rollouts import ROLLOUTS, part

if TYPE_CHECKING:  # the driver needs no torch
    from ctrlray.train.ppo.loop import PPOTask
    from ctrlray.train.ppo.transfer import Group, Layers

HANDOVER = "handover"
_REQUEST, _OFFER, _SENT = "request.json", "offer.json", "sent.json"


class Request(NamedTuple):
    """Which weights the engines want."""

    ranks: Ranks
    members: int
    """Another number when the group has to be formed anew."""
    dtype: str
    least: int
    most: int
    """The versions that would do."""


class Until(Protocol):
    """Waits for something and fails in time, saying what it waited for."""

    def __call__(self, there: Callable[[], bool], what: object) -> None:
        """Return when it is there."""


class Incoming:
    """The driver's side."""

    def __init__(self, out: Storage, engines: EnginePool, dtype: str, until: Until) -> None:
        self._out, self._engines, self._dtype, self._until = out, engines, dtype, until
        self._asked, self._asking = 0, False
        self.waited_s = 0.0
        """Time that the last request waited for the trainer."""

    def bring(self, least: int, most: int) -> None:
        """Have the trainer send its weights, of a version from `least` to `most`, to every engine; returns when all prove them.

        Raises ClusterError when one does not, or does not get them.
        """
        if self._asking:  # an engine that took another's place since is served with the others
            return
        self._asking = True
        try:
            self._engines.heal()
            self._exchange(Request(self._engines.ranks, self._engines.members, self._dtype, least, most))
        finally:
            self._asking = False

    def _exchange(self, request: Request) -> Sync:
        began = time.perf_counter()
        self._forget()
        self._asked += 1
        self._out.write_json(request._asdict(), HANDOVER, _name(self._asked, _REQUEST))
        self._until(lambda: self._has(_OFFER), f"version {request.least} of the weights")
        self.waited_s = time.perf_counter() - began
        landing = self._engines.receive(Offer.of(self._read(_OFFER)))
        self._until(landing.over, landing)
        self._until(lambda: self._has(_SENT), f"what version {landing.offer.version} of the weights adds up to")
        return self._engines.prove(landing, Expected(**self._read(_SENT)))

    def _forget(self) -> None:
        """Remove the exchange before the last one; of the last one a trainer may be reading that began anew."""
        for kind in (_REQUEST, _OFFER, _SENT) if self._asked > 1 else ():
            self._out.remove(HANDOVER, _name(self._asked - 1, kind))

    def _has(self, kind: str) -> bool:
        return self._out.exists(HANDOVER, _name(self._asked, kind))

    def _read(self, kind: str) -> Any:
        return self._out.read_json(HANDOVER, _name(self._asked, kind))


class Outgoing:
    """The trainer's side; every rank keeps one and calls it alike, rank 0 sends. `group(address, port, size)` forms a group."""

    def __init__(self, task: PPOTask, layers: Layers, rank: int, ranks: int, group: Callable[[str, int, int], Group]) -> None:
        self._task, self._layers, self._rank, self._ranks, self._new_group = task, layers, rank, ranks, group
        self._out = task.out
        self._group: Group | None = None
        self._members = -1
        self._answered = self._version = 0
        self.seconds = 0.0
        """Time that sending took so far."""
        self._shapes: dict[str, list[int]] = layers.shapes()
        if odd := tensor_names(task.folder) ^ set(self._shapes):
            raise ConfigError(
                f"the network's weights are not named as those of {task.folder}: {sorted(odd)[:3]} on one side only. "
                "Set transfer: file for ppo"
            )

    def meet(self, version: int, there: bool) -> bool:
        """Send `version` to engines that ask for it; whether the loop may go on. `there`: whether its rollouts are."""
        number, go_on = (self._asked(version), there and not self._owed(version)) if self._rank == 0 else (0, False)
        number, go_on = self._agreed(number, go_on)
        if not number:
            return go_on
        began = time.perf_counter()
        self._send(number, version)
        self._answered, self._version = number, version
        self.seconds += time.perf_counter() - began
        return False

    def _agreed(self, number: int, go_on: bool) -> tuple[int, bool]:
        """What rank 0 saw, on every rank: sending gathers shards of all."""
        if self._ranks == 1:
            return number, go_on
        import torch.distributed as dist

        seen = [number, go_on]
        dist.broadcast_object_list(seen, src=0)
        return int(seen[0]), bool(seen[1])

    def _asked(self, version: int) -> int:
        """The number of a request that this version answers, or 0.

        Raises ClusterError for one that an earlier life of this trainer began to answer: engines still wait in its group.
        """
        names = self._out.names(HANDOVER, suffix=_REQUEST)
        number = int(names[-1].split("-")[0]) if names else 0
        if number <= self._answered or self._out.exists(HANDOVER, _name(number, _SENT)):
            return 0
        if self._out.exists(HANDOVER, _name(number, _OFFER)):
            raise ClusterError("a worker was lost while it sent weights, and the engines wait for the rest; run the job again")
        return number if self._read(number).least <= version <= self._read(number).most else 0

    def _owed(self, version: int) -> bool:
        """Whether the driver cannot sample the step that is next for it without this version, and did not get it yet."""
        needed_by = version + self._task.objective.max_staleness
        if version == 0 or needed_by >= self._task.objective.steps or self._version >= version:
            return False
        return not self._out.exists(ROLLOUTS, f"{part(needed_by)}.parquet")

    def _read(self, number: int) -> Request:
        raw = self._out.read_json(HANDOVER, _name(number, _REQUEST))
        return Request(**{**raw, "ranks": Ranks(*raw["ranks"])})

    def _send(self, number: int, version: int) -> None:
        if self._rank != 0:
            for _ in self._layers.gathered():
                pass
            return
        import torch

        request = self._read(number)
        group = self._offer(number, version, request)
        given = Given(self._task.folder, self._shapes, self._task.control_ids)
        for _, tensor in given.watch(self._layers.merged(getattr(torch, request.dtype))):
            group.send(tensor)
        group.flush()
        self._out.write_json(Expected(given.sums, given.sizes)._asdict(), HANDOVER, _name(number, _SENT))

    def _offer(self, number: int, version: int, request: Request) -> Group:
        """Say what comes, and where; the group, once all engines are in it."""
        from ray.util import get_node_ip_address

        if self._group is not None and request.members != self._members:
            self._group.close()
            self._group = None
        address, port = get_node_ip_address(), 0 if self._group else _free_port()
        offer = Offer(version, request.ranks, address, port, request.dtype, list(self._shapes), list(self._shapes.values()))
        self._out.write_json(offer._asdict(), HANDOVER, _name(number, _OFFER))
        if self._group is None:
            self._group, self._members = self._new_group(address, port, request.ranks.world_size), request.members
        return self._group


def outgoing(task: PPOTask, network: Any, rank: int, ranks: int) -> Outgoing:
    """The trainer's side for a network that trains."""
    from ctrlray.train.models import adapter_card
    from ctrlray.train.ppo.transfer import Group, Layers

    card = adapter_card(task.settings.lora, task.control_ids)
    return Outgoing(task, Layers(network, card, sharded=task.settings.zero_stage == 3), rank, ranks, Group)


def clear(out: Storage) -> None:
    """Forget what an earlier run asked for, before a trainer starts."""
    if out.exists(HANDOVER):
        out.delete(HANDOVER)


def _name(number: int, kind: str) -> str:
    return f"{number:06d}-{kind}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
