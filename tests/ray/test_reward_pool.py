"""Persistent reward actors on a real Ray: rows that fail or kill, rewards that cannot be made, and order."""

from __future__ import annotations

import time

import numpy as np
import pytest
import ray

from ctrlray import config
from ctrlray.errors import ClusterError, ConfigError
from ctrlray.rewards.pool import RewardPool

pytestmark = pytest.mark.usefixtures("local_ray")


def function(target, *attributes):
    return config.FunctionReward(target=f"tests.fakes:{target}", attributes=attributes)


def pool(name, *rewards, size=1, timeout_s=60, **more):
    return RewardPool(rewards, config.Pool(min_size=size, max_size=size, cpus=0.1, **more), name, timeout_s)


def ask(texts):
    return [[{"role": "user", "content": f"question {i}"}] for i in range(len(texts))], texts


def pids(rewards):
    actors = [a for p in rewards._pools for a in p.actors]
    return ray.get([a.__ray_call__.remote(lambda self: __import__("os").getpid()) for a in actors])


def gone(name):
    """Whether an actor ends soon: to kill one is a message."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            ray.get_actor(name)
        except ValueError:
            return True
        time.sleep(0.1)
    return False


def test_scores_keep_their_order_and_the_actors_their_processes():
    texts = ["a" * (i * 7 % 23) for i in range(40)]
    with pool("order", function("length_reward", "brevity", "variety"), function("deadly_reward", "length"), size=2) as rewards:
        before = pids(rewards)
        columns, errors = rewards.score(*ask(texts), batch_size=8)
        assert list(columns) == ["brevity", "variety", "length"] and set(errors) == {""}
        assert columns["brevity"].tolist() == [-float(len(t)) for t in texts]
        assert columns["variety"].tolist() == [float(len(set(t))) for t in texts]
        assert columns["length"].dtype == np.float32 and columns["length"].tolist() == [float(len(t)) for t in texts]
        assert rewards.score(*ask(["again"]), batch_size=8)[0]["length"].tolist() == [5.0]
        assert pids(rewards) == before and len(set(before)) == 4  # nothing is started anew
        assert rewards.score([], [], batch_size=8)[0]["length"].shape == (0,)
    assert gone("order-0-0-0")


def test_a_row_fails_alone_and_is_not_given_to_the_next_reward():
    texts = ["fine", "nan", "boom", "kill", "also fine"]
    with pool("faults", function("faulty_reward", "a"), function("deadly_reward", "b")) as rewards:
        columns, errors = rewards.score(*ask(texts), batch_size=5)
        assert errors[0] == errors[4] == "" and columns["b"][[0, 4]].tolist() == [4.0, 9.0]
        assert errors[1] == "not_finite: a is nan" and errors[2] == "RuntimeError: this reward cannot read boom"
        assert errors[3].startswith("process_died: alone with it the reward's process ended: ")
        assert np.isnan(columns["a"][[1, 2]]).all() and columns["a"][3] == 4.0 and np.isnan(columns["b"][1:4]).all()


@pytest.mark.slow
def test_a_row_that_kills_actors_is_found_among_many():
    texts = [f"answer {i}" for i in range(20)]
    texts[13] = "kill"
    with pool("deadly", function("deadly_reward", "length"), size=2) as rewards:
        columns, errors = rewards.score(*ask(texts), batch_size=10)
        assert [i for i, e in enumerate(errors) if e] == [13] and errors[13].startswith("process_died: ")
        assert [i for i in range(20) if columns["length"][i] != len(texts[i])] == [13]
        assert rewards.score(*ask(["on we go"]), batch_size=1)[1] == [""]


@pytest.mark.slow
def test_rewards_that_end_too_often_are_given_up():
    said = r"tired-0: reward actors ended 2 times in a row .*, more than score\.pool\.max_restarts=1 allows; the last one with: "
    with pool("tired", function("deadly_reward", "length"), max_restarts=1) as rewards, pytest.raises(ClusterError, match=said):
        rewards.score(*ask(["kill", "kill"]), batch_size=2)


def test_scores_of_the_wrong_length_say_so_by_row():
    with pool("length", function("short_reward", "length")) as rewards:
        columns, errors = rewards.score(*ask(["short", "b", "ccc"]), batch_size=3)
        assert errors[0].startswith("ValueError: wrong_length: ") and errors[1:] == ["", ""]
        assert columns["length"][1:].tolist() == [1.0, 3.0]


def test_what_is_no_row_s_fault_reaches_the_caller_as_it_is():
    refused = pool("refused", function("length_reward", "brevity"), function("absent", "x"))
    with pytest.raises(ConfigError, match=r"tests\.fakes:absent.*has no attribute .absent") as caught:
        refused.__enter__()
    assert type(caught.value) is ConfigError
    for name in ("refused-0-0-0", "refused-1-0-0"):
        assert gone(name)
    with pool("lost", function("lost_reward", "x")) as rewards, pytest.raises(ClusterError, match=r"^no server at") as caught:
        rewards.score(*ask(["a", "lost"]), batch_size=2)
    assert type(caught.value) is ClusterError


@pytest.mark.slow
def test_a_reward_that_never_answers_and_one_that_finds_no_room():
    said = (
        "stuck-0: no reward actor finished a batch within 3 s; 2 answers are in flight on 1 reward actors. "
        r"Raise cluster\.stall_timeout_s or lower score\.batch_size"
    )
    with pool("stuck", function("stuck_reward", "x")) as rewards:
        rewards._pools[0]._timeout_s = 3  # the start may take its time
        with pytest.raises(ClusterError, match=said):
            rewards.score(*ask(["a", "stuck"]), batch_size=2)
    big = RewardPool([function("length_reward", "brevity")], config.Pool(cpus=64), "big", 3)
    with pytest.raises(ClusterError, match="big-0: 1 of 1 reward actors did not start within 3 s; each reserves 64 CPUs"):
        big.__enter__()
