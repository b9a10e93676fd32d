"""The engine pool over actors that live in this process: order, deaths, replacement, weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from ctrlray import config
from ctrlray.engine import pool as pools
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.errors import ClusterError

SPEC = EngineSpec("nowhere", "float32", 64, config.EngineSettings(tensor_parallel=2))


class Host:
    """Answers with the prompt; ends at the token 13. Engine 1 of those named `odd` keeps its old weights."""

    def __init__(self, spec):
        self.loaded = self.answer = None

    def ready(self):
        return 1

    def generate(self, prompts, sampling):
        if any(13 in p for p in prompts):
            raise ValueError("13 is unlucky")
        return [Completion(str(p), list(p), -1.0, "stop") for p in prompts]

    def load_weights(self, folder, version):
        self.loaded = folder, version
        return version, {"sum": float(self.odd)}


class Broken(Host):
    def ready(self):
        raise ValueError("no room for the KV cache")


class Actor:
    def __init__(self, kind, options, spec):
        self.options, self.killed, self.host = options, False, kind(spec)
        self.host.odd = options["name"].startswith("odd-1")

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

    def wait(self, refs, timeout):
        self.waits += 1
        return (refs[:1], refs[1:]) if self.waits % 2 else (refs[-1:], refs[:-1])

    def get(self, ref, timeout=None):
        if isinstance(ref, list):
            return [self.get(r) for r in ref]
        ref.taken = True
        if ref.error is not None:
            raise ref.error
        return ref.value

    def kill(self, actor):
        actor.killed = True


@pytest.fixture
def cluster(monkeypatch):
    made = Ray()
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
    assert sum(rows for rows, _ in told) == 5 and sum(tokens for _, tokens in told) == 15
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


def test_engines_that_end_too_often_are_given_up_with_the_last_words(cluster):
    said = (
        r"p: engines ended 3 times, more than generate\.pool\.max_restarts=2 allows; the last one with: ValueError: 13 is unlucky"
    )
    with pool(max_restarts=2) as engines, pytest.raises(ClusterError, match=said):
        engines.generate([[13], [1]], config.Sampling(), 2)


def test_engines_that_disagree_on_their_weights_stop_the_run(cluster):
    with pool("odd") as engines:
        with pytest.raises(ClusterError, match=r"engine 1 holds other weights than engine 0.*'sum': 1\.0"):
            engines.load_weights("/w")
        assert engines.weights_version == 0


def test_engines_that_do_not_start_leave_none_behind(cluster, monkeypatch):
    monkeypatch.setattr(pools, "EngineHost", Broken)
    with pytest.raises(ClusterError, match="p: an engine did not start: ValueError: no room for the KV cache"):
        pool().__enter__()
    assert [a.killed for a in cluster.actors] == [True, True]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ray.exceptions.GetTimeoutError("late"), "did not load the weights within"),
        (ray.exceptions.RayActorError("00", "it died\nits node is gone"), "ended while it loaded the weights: its node is gone"),
    ],
)
def test_weights_that_do_not_arrive_stop_the_run(cluster, monkeypatch, error, message):
    def get(answers, timeout=None):
        assert timeout is not None, "nobody waits for ever"
        raise error

    with pools.EnginePool(SPEC, config.Pool(), "p") as pool:
        monkeypatch.setattr(pools.ray, "get", get)
        with pytest.raises(ClusterError, match=message):
            pool.load_weights("folder")
