"""The ingress's side of other deployments, with handles that fail as Ray's do; and streams whose items travel together."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from ctrlray import config
from ctrlray.distill import Levels
from ctrlray.serve.desk import Desk, Outcome
from ctrlray.serve.handles import RemoteDesk, ReplicaEngine
from ctrlray.serve.limits import Asked, Wait
from ctrlray.serve.policy import Key, hashed
from ctrlray.serve.refusal import Refusal
from ctrlray.serve.rewards import RewardJudge
from ctrlray.serve.stream import coalesce, pause_s

KEY = Key(name="web", hash=hashed("x"))
ASKED = Asked("t", KEY, "m", 5)
OUTCOME = Outcome("t", "web", "m", 200, {"safety": 2}, 3, 2, 0.1, 0.05)
ENDED = (ActorDiedError(), RayTaskError("answer", "traceback", ValueError("secret")), DeploymentUnavailableError("gone"))


class Stream:
    """What a streaming handle's call returns."""

    def __init__(self, items):
        self.items, self.cancelled = list(items), 0

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if isinstance(item, BaseException):
            raise item
        if callable(item):
            return await item()
        return item

    def cancel(self):
        self.cancelled += 1


class Method:
    """One method of a handle; `call` answers it."""

    def __init__(self, call):
        self.remote = call


class Handle:
    """A deployment's handle."""

    def __init__(self, **methods):
        for name, call in methods.items():
            setattr(self, name, Method(call))

    def options(self, stream):
        assert stream
        return self


def engine(*items, timeout_s=5.0):
    stream = Stream(items)
    return ReplicaEngine(Handle(answer=lambda order: stream), timeout_s), stream


async def gathered(engine):
    return [batch async for batch in engine.answer({})]


async def never():
    await asyncio.sleep(60)


def test_a_replicas_answer_passes():
    made, stream = engine(["a"], ["b", "c"])
    assert asyncio.run(gathered(made)) == [["a"], ["b", "c"]] and stream.cancelled == 0


@pytest.mark.parametrize("error", ENDED)
@pytest.mark.parametrize("before", [[], [["a"]]])
def test_a_replica_that_ends_is_503_with_no_word_of_its_error(before, error):
    made, stream = engine(*before, error)
    with pytest.raises(Refusal) as caught:
        asyncio.run(gathered(made))
    assert (caught.value.status, caught.value.code) == (503, "engine_error")
    assert "secret" not in str(caught.value.body()) and stream.cancelled == 1


def test_a_full_handle_is_429():
    made, _ = engine(BackPressureError(1, 1))
    with pytest.raises(Refusal) as caught:
        asyncio.run(gathered(made))
    assert caught.value.status == 429 and caught.value.retry_after_s


@pytest.mark.parametrize("before", [[], [["a"], ["b"]]])
def test_an_engine_that_hangs_is_given_up_and_cancelled(before):
    made, stream = engine(*before, never, timeout_s=0.1)
    with pytest.raises(Refusal) as caught:
        asyncio.run(gathered(made))
    assert caught.value.code == "engine_timeout" and stream.cancelled == 1


def test_closing_an_answer_cancels_the_replicas_work():
    async def leave():
        answer = made.answer({})
        await anext(answer)
        await answer.aclose()

    made, stream = engine(["a"], ["b"])
    asyncio.run(leave())
    assert stream.cancelled == 1


def remote(desk):
    """A desk behind a handle."""
    return Handle(admit=desk.admit, settle=desk.settle, refused=desk.refused, metrics=desk.metrics)


def test_a_remote_desk_counts_like_one_beside_the_ingress():
    async def scenario():
        desk = RemoteDesk(remote(Desk({"m": 1})))
        assert await desk.admit(ASKED) is None
        wait = await desk.admit(ASKED._replace(ticket="u"))
        assert isinstance(wait, Wait) and wait.retry_after_s > 0
        await desk.settle(OUTCOME)
        await desk.refused("web", 403)
        assert await desk.admit(ASKED._replace(ticket="u")) is None
        return (await desk.metrics()).decode()

    text = asyncio.run(scenario())
    assert 'ctrlray_level_tokens_total{attribute="safety",level="2",model="m"} 2.0' in text
    assert 'ctrlray_refused_total{key="web",status="403"} 1.0' in text


@pytest.mark.parametrize("error", ENDED)
def test_a_desk_that_ended_refuses_new_requests_and_loses_no_answer(error):
    async def gone(*_):
        raise error

    async def scenario():
        desk = RemoteDesk(Handle(admit=gone, settle=gone, refused=gone, metrics=gone))
        await desk.settle(OUTCOME)
        await desk.refused("web", 400)
        for call in (desk.admit(ASKED), desk.metrics()):
            with pytest.raises(Refusal) as caught:
                await call
            assert caught.value.status == 503 and caught.value.retry_after_s

    asyncio.run(scenario())


CONTROL = config.Control.model_validate(
    {"attributes": [{"name": "safety", "levels": 3, "score": {"harm": -1.0, "calm": 1.0}}, {"name": "brevity", "levels": 3}]}
)
SCALES = {"safety": Levels.fit(range(31), 3), "brevity": Levels.fit(range(31), 3)}


def judge(*scores, timeout_s=5.0):
    def handle(found):
        async def score(chats, texts):
            assert len(chats) == len(texts) and chats[0] == [{"role": "user", "content": "Hi"}]
            if isinstance(found, BaseException):
                raise found
            if found is None:
                await never()
            return {name: np.asarray(values, np.float32) for name, values in found.items()}, [""] * len(texts)

        return Handle(score=score)

    made = RewardJudge([handle(s) for s in scores], CONTROL, SCALES, timeout_s)
    return asyncio.run(made.units([{"role": "user", "content": "Hi"}], ["a", "b"]))


def test_scores_of_several_rewards_become_units():
    units = judge({"harm": [0.0, 5.0], "calm": [15.0, 15.0]}, {"brevity": [30.0, float("nan")]})
    assert units[0][0] == SCALES["safety"].units(np.asarray([15.0]))[0]
    assert units[1][0] == SCALES["safety"].units(np.asarray([10.0]))[0] < units[0][0]
    assert units[0][1] == SCALES["brevity"].units(np.asarray([30.0]))[0] and np.isnan(units[1][1])


@pytest.mark.parametrize("problem", [ActorDiedError(), None])
def test_a_reward_that_is_not_there_is_503(problem):
    with pytest.raises(Refusal) as caught:
        judge({"harm": [0.0, 0.0], "calm": [0.0, 0.0]}, problem, timeout_s=0.2)
    assert (caught.value.status, caught.value.code) == (503, "reward_error")


async def paced(*items):
    for pause, item in items:
        await asyncio.sleep(pause)
        if isinstance(item, Exception):
            raise item
        yield item


def test_what_comes_fast_travels_together_and_the_first_does_not_wait():
    async def scenario():
        begun = asyncio.get_running_loop().time()
        batches, times = [], []
        async for batch in coalesce(paced((0, 1), (0.01, 2), (0.01, 3), (0.3, 4)), lambda: 0.15):
            batches.append(batch)
            times.append(asyncio.get_running_loop().time() - begun)
        return batches, times

    batches, times = asyncio.run(scenario())
    assert batches == [[1], [2, 3], [4]] and times[0] < 0.1 <= times[1]


def test_many_streams_on_few_cores_send_less_often():
    assert pause_s(0.1, 1, 2) == pause_s(0.1, 6, 2) == 0.1
    assert pause_s(0.1, 12, 2) == 0.2 and pause_s(0.1, 12, 16) == 0.1


def test_an_error_comes_after_what_was_before_it():
    async def scenario():
        seen = []
        with pytest.raises(KeyError):
            async for batch in coalesce(paced((0, 1), (0, 2), (0, KeyError("x"))), lambda: 0.05):
                seen += batch
        return seen

    assert asyncio.run(scenario()) == [1, 2]


def test_a_consumer_that_stops_ends_the_producer():
    ended = []

    async def endless():
        try:
            while True:
                yield 0
                await asyncio.sleep(0.01)
        finally:
            ended.append(True)

    async def scenario():
        batches = coalesce(endless(), lambda: 0.05)
        await anext(batches)
        await batches.aclose()

    asyncio.run(scenario())
    assert ended == [True]
