"""A trainer and engines that meet through storage and lines of queues: which version goes when, who joins whom, what stops."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ctrlray import actors, config
from ctrlray.engine import pool as pools
from ctrlray.engine.probes import Given
from ctrlray.engine.transfer import Ranks, Received
from ctrlray.errors import ClusterError, ConfigError
from ctrlray.ledger import Silent
from ctrlray.patience import Background
from ctrlray.tables import Storage
from ctrlray.train.launch import Watch
from ctrlray.train.ppo import drive
from ctrlray.train.ppo.handover import HANDOVER, Incoming, Outgoing, Request
from ctrlray.train.ppo.rollouts import ROLLOUTS, part
from tests.unit.test_pool import SPEC, Ray

TENSORS = {"model.embed_tokens.weight": torch.ones(6, 2), "model.layers.0.self_attn.q_proj.weight": torch.eye(2)}
CONTROL_IDS = (4, 5)
STEPS = 4


class Wire:
    """What a group's members hear, by port and rank; `formed` has the size of each group, `sent` counts updates."""

    def __init__(self):
        self.lines, self.formed, self.closed, self.sent = {}, [], 0, 0

    def line(self, port, rank):
        return self.lines.setdefault((port, rank), queue.Queue())


class Group:
    """The trainer's end."""

    def __init__(self, wire, port, size):
        self.wire, self.port, self.size = wire, port, size
        wire.formed.append(size)

    def send(self, tensor):
        for rank in range(1, self.size, SPEC.settings.tensor_parallel):
            self.wire.line(self.port, rank).put(tensor)

    def flush(self):
        self.wire.sent += 1

    def close(self):
        self.wire.closed += 1


class Layers:
    """A network whose every weight grows by one with a version."""

    version = 0

    def shapes(self):
        return {n: list(t.shape) for n, t in TENSORS.items()}

    def merged(self, dtype):
        for name, tensor in TENSORS.items():
            yield name, (tensor + self.version).to(dtype)


class Host:
    """One engine: takes tensors off its line."""

    wire = None

    def __init__(self, spec):
        self.line, self.held, self.gone, self.answer = None, {}, False, None

    def ready(self):
        if self.gone:
            raise ValueError("killed")
        return 1

    def receive_weights(self, offer, index):
        if offer.port:
            self.line = self.wire.line(offer.port, offer.joining(index)["rank_offset"])
        self.held = {name: self.line.get(timeout=5) for name in offer.names}
        if self.fault == "crooked":
            self.held["model.embed_tokens.weight"][5, 1] += 1
        found = Given("engine", self.held, CONTROL_IDS)
        list(found.watch(iter(self.held.items())))
        return Received(offer.version, [found.sums], 0.1)


@pytest.fixture
def cluster(monkeypatch):
    made = Ray()
    monkeypatch.setattr(actors, "ray", made)
    monkeypatch.setattr(pools, "EngineHost", Host)
    monkeypatch.setattr(Host, "wire", Wire())
    return made


@pytest.fixture
def out(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(TENSORS, tmp_path / "base" / "model.safetensors")
    return Storage(str(tmp_path))


def sampled(out, step):
    out.write_bytes(b"", ROLLOUTS, f"{part(step)}.parquet")


def trainer(out, layers, folder="base", max_staleness=0):
    ppo = config.PPO(steps=STEPS, max_staleness=max_staleness)
    task = SimpleNamespace(out=out, folder=out.path(folder), control_ids=CONTROL_IDS, objective=ppo)
    return Outgoing(task, layers, 0, 1, lambda address, port, size: Group(Host.wire, port, size))


class Learner:
    """Waits for each step's rollouts as the loop does, and sends when it is asked."""

    def __init__(self, out, **settings):
        self.out, self.layers, self.over = out, Layers(), threading.Event()
        self.outgoing = trainer(out, self.layers, **settings)

    def run(self):
        for step in range(STEPS):
            self.wait(step)
        self.out.write_json({"step": STEPS, "steps": STEPS, "recent": []}, "progress.json")

    def wait(self, step):
        self.layers.version = step
        while not self.outgoing.meet(step, self.out.exists(ROLLOUTS, f"{part(step)}.parquet")) and not self.over.is_set():
            time.sleep(0.002)


class Producer:
    """Notes what engines hold when a step is sampled; the first engine ends in step `dies`, `idle` or at work."""

    def __init__(self, out, engines, cluster, dies, idle):
        self.out, self.engines, self.cluster, self.dies, self.idle, self.made = out, engines, cluster, dies, idle, []

    def has(self, step):
        return self.out.exists(ROLLOUTS, f"{part(step)}.parquet")

    def make(self, step, notes):
        assert set(notes) == {"sync_s", "learner_s"}
        if step == self.dies:
            self.cluster.actors[0].host.gone = True
            if not self.idle:
                self.engines.heal()
        hosts = [a.host for a in self.cluster.actors if not a.killed]
        held = {h.held["model.embed_tokens.weight"][0, 0].item() - 1 if h.held else 0.0 for h in hosts}
        self.made.append((step, self.engines.weights_version, held))
        sampled(self.out, step)
        return 10


def driver(out, cluster, engines, run, timeout_s=5.0, dies=-1, idle=False, **settings):
    producer = Producer(out, engines, cluster, dies, idle)
    task = SimpleNamespace(objective=config.PPO(steps=STEPS, **settings), out=out, settings=config.Train())
    made = drive._Driver(task, producer, Background(run), Watch("ppo", out, Silent()), Silent(), timeout_s)
    made.incoming = Incoming(out, engines, "float32", made.until)
    return made, producer


def pool(name="p"):
    return pools.EnginePool(SPEC, config.Pool(min_size=2, max_size=2), name, 5)


@pytest.mark.parametrize("stale", [0, 1])
def test_every_step_is_sampled_with_the_weights_that_it_needs(cluster, out, stale):
    with pool() as engines:
        made, producer = driver(out, cluster, engines, Learner(out, max_staleness=stale).run, max_staleness=stale)
        made.run()
    versions = [max(0, step - stale) for step in range(STEPS)]
    assert producer.made == [(step, v, {float(v)}) for step, v in enumerate(versions)]
    assert Host.wire.formed == [5] and Host.wire.closed == 0  # the trainer and two engines of two processes each, once
    kept = {name[:6] for name in out.names(HANDOVER)}
    assert kept == ({"000002", "000003"} if stale == 0 else {"000001", "000002"})


@pytest.mark.parametrize(("idle", "updates"), [(False, 4), (True, 3)])
def test_an_engine_that_took_anothers_place_joins_a_new_group_and_gets_the_weights_in_force(cluster, out, idle, updates):
    """One that ends at work is given them at once, one that ends idle with the next version."""
    with pool() as engines:
        made, producer = driver(out, cluster, engines, Learner(out).run, dies=2, idle=idle)
        made.run()
    assert producer.made == [(step, step, {float(step)}) for step in range(STEPS)] and len(cluster.actors) == 3
    assert Host.wire.formed == [5, 5] and Host.wire.closed == 1 and Host.wire.sent == updates


def test_an_engine_that_did_not_get_what_was_sent_stops_the_run(cluster, out):
    learner = Learner(out)
    with pool("crooked") as engines:
        made, producer = driver(out, cluster, engines, learner.run)
        said = r"crooked: engine 1 does not compute with the weights of version 1: its embedding adds up to 25\.0, .* to 24\.0"
        with pytest.raises(ClusterError, match=said):
            made.run()
    assert [step for step, *_ in producer.made] == [0]
    learner.over.set()


def test_an_engine_that_does_not_get_them_in_time_stops_the_run(cluster, out, monkeypatch):
    learner = Learner(out)
    with pool() as engines:
        made, _ = driver(out, cluster, engines, learner.run, timeout_s=2.0)
        monkeypatch.setattr(cluster, "wait", lambda refs, timeout, num_returns: ([], refs))
        monkeypatch.setattr(drive, "waits_for", lambda out, settings: "its workers")
        said = r"nothing finished for 2 s; it waits for p: engine 0, 1 to take 0\.00 GB of weights, version 1, from"
        with pytest.raises(ClusterError, match=said):
            made.run()
    learner.over.set()


def test_weights_are_offered_only_to_whom_they_would_do(out):
    """And a step waits while the engines need the weights before it."""
    made = trainer(out, Layers(), max_staleness=1)
    sampled(out, 1)
    assert made.meet(0, True)
    assert not made.meet(1, True)  # step 2 cannot be sampled without version 1
    request = Request(Ranks(2, 2), 0, "float32", least=2, most=2)
    out.write_json(request._asdict(), HANDOVER, "000001-request.json")
    assert not made.meet(1, False) and out.names(HANDOVER) == ["000001-request.json"]
    sampled(out, 2)
    assert made.meet(1, True) and made.meet(3, True)  # nobody samples behind the last step
    out.write_json({}, HANDOVER, "000001-sent.json")  # it was served before, by a trainer that was lost since
    assert not made.meet(2, False) and out.names(HANDOVER) == ["000001-request.json", "000001-sent.json"]


def test_a_trainer_that_was_lost_while_it_sent_is_not_repeated(out):
    request = Request(Ranks(2, 2), 0, "float32", least=1, most=1)
    out.write_json(request._asdict(), HANDOVER, "000004-request.json")
    out.write_json({}, HANDOVER, "000004-offer.json")
    with pytest.raises(ClusterError, match="lost while it sent weights"):
        trainer(out, Layers()).meet(1, False)


def test_a_network_of_other_names_cannot_send(out):
    save_file(TENSORS | {"lm_head.weight": torch.ones(6, 2)}, out.path("base", "model.safetensors"))
    with pytest.raises(ConfigError, match=r"named as those of .*: \['lm_head\.weight'\] on one side only\. Set transfer: file"):
        trainer(out, Layers())
