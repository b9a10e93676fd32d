"""The engine pool over actors that live in this process: order, deaths, replacement, weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import ray
import torch

from ctrlray import actors, config
from ctrlray.engine import pool as pools
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.engine.probes import Expected, Held, Probe
from ctrlray.engine.transfer import Offer, Ranks, Received
from ctrlray.errors import ClusterError, ConfigError

SPEC = EngineSpec("nowhere", "float32", 64, config.EngineSettings(tensor_parallel=2))


class Host:
    """Answers with the prompt; ends at the token 13. What engine 1 of a pool has at fault, the pool's name says."""

    def __init__(self, spec):
        self.loaded = self.answer = None
        self.gone = False

    def ready(self):
        if self.gone:
            raise ValueError("killed")
        return 1

    def generate(self, prompts, sampling):
        if any(13 in p for p in prompts):
            raise ValueError("13 is unlucky")
        return [Completion(str(p), list(p), -1.0, "stop", [-0.5] * len(p)) for p in prompts]

    def logp(self, contexts, answers):
        if any(13 in a for a in answers):
            raise ValueError("13 is unlucky")
        return [-float(sum(c) + 10 * sum(a)) for c, a in zip(contexts, answers, strict=True)]

    def load_weights(self, folder, version):
        self.loaded = folder, version
        return self._held(1.0, version)

    def load_adapter(self, adapter, card, version):
        if "stray" in adapter:
            raise ConfigError("adapter tensors without a home: stray")
        self.loaded = {n: a.tolist() for n, a in adapter.items()}, card, version
        return self._held(float(sum(a.sum() for a in adapter.values())), version)

    def receive_weights(self, offer, index):
        found = {"first qkv": 3.0}, {"first qkv": 0.5}  # an engine of two processes
        match self.fault:
            case "deaf":
                raise ValueError("the line is cut")
            case "odd":
                found[0]["first qkv"] += 1e-12
            case "lying":
                found[0]["first qkv"] += 1e-6
        self.loaded = offer, index
        return Received(offer.version - (self.fault == "late"), list(found), 0.5 if self.fault else 0.125)

    def _held(self, total, version):
        expected, found = total, total
        match self.fault:
            case "odd":
                expected, found = total + 1, total + 1
            case "lying":
                found = total + 1e-6
            case "late":
                version -= 1
        return Held(version, {"first qkv": Probe(expected, found, 1e-9)}, 0.25, 0.5 if self.fault else 0.125)

    def cache_hits(self):
        return 40, 10 if self.fault else 30


class Broken(Host):
    def ready(self):
        raise ValueError("no room for the KV cache")


class Actor:
    def __init__(self, kind, options, spec):
        self.options, self.killed, self.host = options, False, kind(spec)
        self.host.fault = options["name"].split("-")[0] if "-1-" in options["name"] else ""

    def __getattr__(self, name):
        return Method(getattr(self.host, name))


class Method:
    def __init__(self, call):
        self.call = call

    def remote(self, *args):
        host, name = self.call.__self__, self.call.__name__
        assert name != "generate" or host.answer is None or host.answer.taken, "one batch at a time"
        made = self._made(*args)
        host.answer = made if name == "generate" else host.answer
        return made

    def _made(self, *args):
        try:
            return Ref(self.call(*args), None)
        except ConfigError as error:
            return Ref(None, ray.exceptions.RayTaskError("f", "traceback", error, ip="here").as_instanceof_cause())
        except ValueError as error:
            return Ref(None, ray.exceptions.RayActorError("00", f"the actor died\n  in a file\nValueError: {error}"))


class Ref:
    def __init__(self, value, error):
        self.value, self.error, self.taken = value, error, False


class Ray:
    """As much of Ray as the pool uses; of what runs, by turns the first and the last to begin is done."""

    exceptions = ray.exceptions

    def __init__(self):
        self.actors, self.waits = [], 0

    def remote(self, kind):
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda spec: self.start(kind, options, spec)))

    def start(self, kind, options, spec):
        self.actors.append(Actor(kind, options, spec))
        return self.actors[-1]

    def wait(self, refs, timeout, num_returns=1):
        if num_returns == len(refs) > 1:
            return refs, []
        self.waits += 1
        return (refs[:1], refs[1:]) if self.waits % 2 else (refs[-1:], refs[:-1])

    def get(self, ref, timeout=None):
        if isinstance(ref, list):
            return [self.get(r) for r in ref]
        ref.taken = True
        if ref.error is not None:
            raise ref.error
        return ref.value

    def put(self, value):
        return value

    def kill(self, actor):
        actor.killed = True


@pytest.fixture
def cluster(monkeypatch):
    made = Ray()
    monkeypatch.setattr(actors, "ray", made)
    monkeypatch.setattr(pools, "ray", made)
    monkeypatch.setattr(pools, "EngineHost", Host)
    return made


def pool(name="p", size=2, **more):
    return pools.EnginePool(SPEC, config.Pool(min_size=size, max_size=size, cpus=0.5, gpus=0.5, **more), name, 5)


def test_answers_keep_the_order_of_their_prompts(cluster):
    told = []
    with pool() as engines:
        made = engines.generate([[i] * (i + 1) for i in range(5)], config.Sampling(), 2, lambda *done: told.append(done))
    assert [c.token_ids for c in made] == [[0], [1, 1], [2] * 3, [3] * 4, [4] * 5]
    assert sorted((i, c.token_ids) for places, batch in told for i, c in zip(places, batch, strict=True)) == list(
        enumerate(c.token_ids for c in made)
    )
    assert len(cluster.actors) == 2 and all(a.killed for a in cluster.actors)
    assert [(a.options["num_cpus"], a.options["num_gpus"]) for a in cluster.actors] == [(0.5, 1.0)] * 2


def test_a_prompt_that_ends_engines_is_left_out_and_new_engines_get_the_weights_in_force(cluster):
    with pool() as engines:
        assert engines.load_weights("/first") == 1 and engines.load_weights("/second") == 2
        made = engines.generate([[i] for i in range(10, 16)], config.Sampling(), 3)
        assert [c and c.token_ids for c in made] == [[10], [11], [12], None, [14], [15]]
        alive = [a for a in cluster.actors if not a.killed]
        assert len(alive) == 2 and all(a.host.loaded == ("/second", 2) for a in alive)
        assert len({a.options["name"] for a in cluster.actors}) == len(cluster.actors) == 2 + 3  # once together, twice alone


def test_log_probs_keep_the_order_of_their_answers_and_leave_out_one_that_ends_engines(cluster):
    with pool() as engines:
        assert engines.logp([[1], [2], [3]], [[1], [13], [2, 2]], 2) == [-11.0, None, -43.0]


def test_engines_that_end_on_everything_are_given_up_with_the_last_words(cluster):
    """With 16 prompts, then with two of the eighths."""
    said = (
        r"p: engines ended 3 times in a row and finished nothing in between, more than generate\.pool\.max_restarts=2 allows; "
        r"the last one with: ValueError: 13 is unlucky"
    )
    with pool(size=1, max_restarts=2) as engines, pytest.raises(ClusterError, match=said):
        engines.generate([[13]] * 16, config.Sampling(), 16)
    assert len(cluster.actors) == 3


@pytest.mark.parametrize("size", [1, 2])
def test_prompts_that_end_engines_cost_as_many_as_it_takes_to_find_them(cluster, size):
    """Six batches of 24, two prompts in each guilty, in other eighths: with the batch, with two eighths, and twice each alone."""
    prompts = [[13] if i % 24 in (0, 21) else [100 + i] for i in range(6 * 24)]
    with pool(size=size, max_restarts=2 * size) as engines:
        made = engines.generate(prompts, config.Sampling(), 24)
    assert [m and m.token_ids for m in made] == [None if p == [13] else p for p in prompts]
    assert len(cluster.actors) == size + 6 * (1 + 2 + 2 * 2)


def test_a_run_of_prompts_that_end_engines_is_no_engine_that_ends_on_everything(cluster):
    """The first eight of 24: the whole and three eighths end in vain, then each of them ends two."""
    prompts = [[13]] * 8 + [[100 + i] for i in range(16)]
    with pool(size=1, max_restarts=4) as engines:
        made = engines.generate(prompts, config.Sampling(), 24)
    assert [m is None for m in made] == [True] * 8 + [False] * 16 and len(cluster.actors) == 1 + 1 + 3 + 8 * 2


def test_engines_that_disagree_on_their_weights_stop_the_run(cluster):
    with pool("odd") as engines:
        said = r"engine 1 holds other weights than engine 0 after the update: its first qkv adds up to 2\.0, that of .* to 1\.0"
        with pytest.raises(ClusterError, match=said):
            engines.load_weights("/w")
        assert engines.weights_version == 0


ADAPTER = {"a.rows": torch.tensor([[1.0, 2.0]]), "w": torch.tensor([0.5], requires_grad=True)}
CARD = {"lora_scale": 2.0, "control_ids": [5]}


def test_an_adapter_reaches_every_engine_and_is_proved(cluster):
    with pool("twin") as engines:
        sync = engines.load_adapter(ADAPTER, CARD, 12)
        assert (sync.version, sync.checksums, engines.weights_version) == (12, {"first qkv": 3.5}, 12)
        assert (sync.seconds.merge, sync.seconds.reload) == (0.25, 0.5) and sync.seconds.total < 5  # the slower engine's
        assert [a.host.loaded for a in cluster.actors] == [({"a.rows": [[1.0, 2.0]], "w": [0.5]}, CARD, 12)] * 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lying", r"lying: engine 1 does not compute with the weights of version 3: its first qkv adds up to 3\.500001"),
        ("late", "late: engine 1 holds weights of version 2 after the update to 3"),
        ("odd", "odd: engine 1 holds other weights than engine 0"),
    ],
)
def test_an_update_that_one_engine_cannot_prove_stops_the_run(cluster, name, said):
    with pool(name) as engines, pytest.raises(ClusterError, match=said):
        engines.load_adapter(ADAPTER, CARD, 3)
    assert engines.weights_version == 0


OFFER = Offer(3, Ranks(2, 2), "10.0.0.7", 4711, "bfloat16", ["a"], [[1000, 500]])
SENT = Expected({"first qkv": 3.5}, {"first qkv": 40.0})


def test_weights_from_a_trainer_reach_every_engine_and_are_proved(cluster):
    with pool("twin") as engines:
        assert engines.ranks == OFFER.ranks
        landing = engines.receive(OFFER)
        assert str(landing) == "twin: engine 0, 1 to take 0.00 GB of weights, version 3, from the trainer at 10.0.0.7"
        assert landing.over() and landing.over()
        sync = engines.prove(landing, SENT)
        assert (sync.version, sync.checksums, engines.weights_version) == (3, {"first qkv": 3.5}, 3)
        assert sync.seconds.total == 0.5  # the slower engine's
        assert [a.host.loaded for a in cluster.actors] == [(OFFER, 0), (OFFER, 1)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lying", r"lying: engine 1 does not compute with the weights of version 3: its first qkv adds up to 3\.500001"),
        ("late", "late: engine 1 holds weights of version 2 after the update to 3"),
        ("odd", "odd: engine 1 holds other weights than engine 0"),
        ("deaf", "deaf: engine 1 ended while it took weights from the trainer: ValueError: the line is cut"),
    ],
)
def test_weights_from_a_trainer_that_one_engine_cannot_prove_stop_the_run(cluster, name, said):
    with pool(name) as engines, pytest.raises(ClusterError, match=said):
        landing = engines.receive(OFFER)
        assert landing.over()
        engines.prove(landing, SENT)
    assert engines.weights_version == 0


def test_engines_that_die_together_are_replaced_once_each_and_asked_for_weights(cluster, monkeypatch):
    """With the first replacement all engines get weights anew, and the other dead one is found before its rows are missed."""
    well, renewed = Host.generate, []

    def generate(self, prompts, sampling):
        self.gone = len(cluster.actors) == 2
        return well(self, [[13]] if self.gone else prompts, sampling)

    monkeypatch.setattr(Host, "generate", generate)
    with pool() as engines:
        engines.renew = lambda: (engines.heal(), renewed.append(engines.members))
        engines.generate([[1], [2]], config.Sampling(), 1)
        assert len(cluster.actors) == 4 and not renewed  # these began with version 0, which is in force
    cluster.actors.clear()
    with pool() as engines:
        engines.renew = lambda: (engines.heal(), renewed.append(engines.members))
        landing = engines.receive(OFFER)
        assert landing.over() and engines.prove(landing, SENT).version == 3
        assert [c.token_ids for c in engines.generate([[1], [2]], config.Sampling(), 1)] == [[1], [2]]
        assert len(cluster.actors) == 4 and renewed == [2, 2]


def test_an_adapter_without_a_home_is_refused_as_what_it_is(cluster):
    with pool() as engines, pytest.raises(ConfigError, match=r"^adapter tensors without a home: stray") as caught:
        engines.load_adapter({"stray": torch.zeros(1)}, CARD, 1)
    assert type(caught.value) is ConfigError and len(cluster.actors) == 2


def test_engines_that_die_at_work_or_between_are_replaced_with_the_adapter_in_force(cluster):
    with pool() as engines:
        engines.load_adapter(ADAPTER, CARD, 4)
        assert engines.generate([[13], [1]], config.Sampling(), 1)[0] is None
        assert len(cluster.actors) == 4 and all(a.host.loaded[2] == 4 for a in cluster.actors if not a.killed)
        next(a for a in cluster.actors if not a.killed).host.gone = True
        assert engines.load_adapter({"w": torch.ones(1)}, CARD, 5).checksums == {"first qkv": 1.0}
        alive = [a for a in cluster.actors if not a.killed]
        assert len(cluster.actors) == 5 and [a.host.loaded for a in alive] == [({"w": [1.0]}, CARD, 5)] * 2


def test_an_engine_that_dies_over_an_update_is_replaced_and_given_it(cluster, monkeypatch):
    with pool() as engines:
        engines.load_adapter(ADAPTER, CARD, 4)
        well = Host.load_adapter
        deaths = iter(range(3))  # both engines over the update, then one replacement over the weights in force

        def load_adapter(self, adapter, card, version):
            if next(deaths, None) is not None:
                raise ValueError("killed")
            return well(self, adapter, card, version)

        monkeypatch.setattr(Host, "load_adapter", load_adapter)
        assert engines.load_adapter({"w": torch.ones(1)}, CARD, 5).version == engines.weights_version == 5
        alive = [a for a in cluster.actors if not a.killed]
        assert len(cluster.actors) == 5 and [a.host.loaded for a in alive] == [({"w": [1.0]}, CARD, 5)] * 2


def test_engines_that_die_over_every_update_are_given_up(cluster, monkeypatch):
    def load_weights(self, folder, version):
        raise ValueError("killed")

    monkeypatch.setattr(Host, "load_weights", load_weights)
    with pool(max_restarts=2) as engines, pytest.raises(ClusterError, match=r"engines ended 3 times in a row .*: killed$"):
        engines.load_weights("/w")


def test_a_replacement_that_cannot_prove_the_weights_gets_no_work(cluster):
    with pool("fine") as engines:
        engines.load_adapter(ADAPTER, CARD, 4)
        held, Host._held = Host._held, lambda self, total, version: held(self, total + 1, version)
        try:
            with pytest.raises(ClusterError, match="engine 1 holds other weights than engine 0"):
                engines.generate([[13]], config.Sampling(), 1)
        finally:
            Host._held = held


def test_the_hit_rate_is_over_all_engines_that_answer(cluster, monkeypatch):
    with pool("twin") as engines:
        assert engines.hit_rate() == 0.5
        monkeypatch.setattr(Host, "cache_hits", lambda self: (0, 0))
        assert math.isnan(engines.hit_rate())


def test_engines_that_do_not_start_leave_none_behind(cluster, monkeypatch):
    monkeypatch.setattr(pools, "EngineHost", Broken)
    with pytest.raises(ClusterError, match="p: an engine did not start: ValueError: no room for the KV cache"):
        pool().__enter__()
    assert [a.killed for a in cluster.actors] == [True, True]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_replacement_that_ends_before_it_is_up_is_replaced_in_its_turn(cluster, monkeypatch, lost):
    """As when its node went away and the cluster did not know yet: so many starts are lost, after the engine's own end."""
    start = cluster.start

    def unlucky(kind, options, spec):
        return start(Broken if 1 <= len(cluster.actors) <= lost else kind, options, spec)

    monkeypatch.setattr(cluster, "start", unlucky)
    with pool(size=1, max_restarts=2) as engines:
        engines.load_weights("/first")
        cluster.actors[0].host.gone = True
        if lost == 2:
            said = r"p: engines ended 3 times in a row .* the last one with: ValueError: no room for the KV cache"
            with pytest.raises(ClusterError, match=said):
                engines.heal()
        else:
            engines.heal()
            assert engines.generate([[1]], config.Sampling(), 1)[0].token_ids == [1]
            assert cluster.actors[-1].host.loaded == ("/first", 1)
    assert len(cluster.actors) == 3 and all(a.killed for a in cluster.actors)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ray.exceptions.GetTimeoutError("late"), "did not load the weights within"),
        (ray.exceptions.RayTaskError("f", "it raised\nno such file", OSError()), "failed to load the weights: no such file"),
    ],
)
def test_weights_that_do_not_arrive_stop_the_run(cluster, monkeypatch, error, message):
    def get(answers, timeout=None):
        assert timeout is not None, "nobody waits for ever"
        raise error

    with pools.EnginePool(SPEC, config.Pool(), "p") as pool:
        monkeypatch.setattr(actors.ray, "get", get)
        with pytest.raises(ClusterError, match=f"p: engine 0 {message}"):
            pool.load_weights("folder")
        with pytest.raises(ClusterError, match="p: "):
            pool.load_adapter({}, {}, 1)
