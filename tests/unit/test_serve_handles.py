"""The ingress's side of other deployments, with handles that fail as Ray's do; and streams whose items travel together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars

import grpc
import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import RequestMetadata
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from ctrlray import config
from ctrlray.distill import Levels
from ctrlray.serve import transport
from ctrlray.serve.desk import Desk, Outcome
from ctrlray.serve.handles import RemoteDesk, ReplicaEngine
from ctrlray.serve.limits import Asked, Wait
from ctrlray.serve.policy import Key, hashed
from ctrlray.serve.refusal import Refusal
from ctrlray.serve.rewards import RewardJudge
from ctrlray.serve.stream import coalesce, pause_s
from tests.ingress import unhurried

KEY = Key(name="web", hash=hashed("x"))
ASKED = Asked("t", KEY, "m", 5)
OUTCOME = Outcome("t", "web", "m", 200, {"safety": 2}, 3, 2, 0.1, 0.05)
ENDED = (
    ActorDiedError(),
    RayTaskError("answer", "traceback", ValueError("secret")),
    DeploymentUnavailableError("gone"),
    ValueError("secret"),  # as errors of a replica come over gRPC
    grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), grpc.aio.Metadata(), "secret"),
)


@pytest.fixture(autouse=True)
def by_actors(monkeypatch):
    """Handles here are made as Ray's own are; test_serve_transport has those over gRPC."""
    monkeypatch.setenv(transport.SWITCH, "actor")


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
    """A deployment's handle; `made` counts the handles that were made of it."""

    def __init__(self, **methods):
        self.made = 0
        self.methods = methods
        for name, call in methods.items():
            setattr(self, name, Method(call))

    def options(self, method_name, stream=False):
        assert stream == (method_name == "answer")
        self.made += 1
        return Method(self.methods[method_name])


def engine(*items, timeout_s=5.0):
    stream = Stream(items)
    return ReplicaEngine(Handle(answer=lambda order: stream), timeout_s), stream


def rays_own(outcome, separate_loop):
    """An engine whose calls are Ray's own, of a request that found no replica, or whose replica's answers are `outcome`."""

    def call(order):
        loop = asyncio.get_running_loop()
        future = concurrent.futures.Future() if separate_loop else loop.create_future()
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        metadata = RequestMetadata("r", "i", is_streaming=True)
        return DeploymentResponseGenerator(future, metadata, _is_router_running_in_separate_loop=separate_loop)

    return ReplicaEngine(Handle(answer=call), 5.0)


@pytest.mark.parametrize("separate_loop", [True, False])
@pytest.mark.parametrize(
    "error, status",
    [(BackPressureError(1, 1), 429), (DeploymentUnavailableError("gone"), 503), (ActorDiedError(), 503), (OSError("odd"), 503)],
)
def test_a_request_that_no_replica_took_has_its_own_status(separate_loop, error, status):
    """Ray's `cancel` of such a call raises what kept it from a replica."""
    with pytest.raises(Refusal) as caught:
        asyncio.run(gathered(rays_own(error, separate_loop)))
    assert caught.value.status == status and caught.value.__cause__ is error


def test_a_request_that_the_replica_gave_up_is_503_and_one_that_the_caller_gave_up_is_cancelled():
    """Ray raises the same for both."""

    class Result:
        cancelled = 0

        async def __anext__(self):
            if self.hangs:
                await never()
            raise asyncio.CancelledError

        def cancel(self):
            self.cancelled += 1

    given_up, left = Result(), Result()
    given_up.hangs, left.hangs = False, True
    with pytest.raises(Refusal) as caught:
        asyncio.run(gathered(rays_own(given_up, True)))
    assert caught.value.status == 503

    async def leave():
        task = asyncio.ensure_future(gathered(rays_own(left, True)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert left.cancelled == 1


def test_a_handle_is_made_once():
    handle = Handle(answer=lambda order: Stream([["a"]]))
    made = ReplicaEngine(handle, 5.0)
    assert [asyncio.run(gathered(made)) for _ in range(3)] == [[["a"]]] * 3 and handle.made == 1


async def gathered(engine):
    return [batch async for batch in engine.answer({})]


async def never():
    await asyncio.sleep(60)


async def silent(*_):
    pass


def test_a_replicas_answer_passes():
    made, stream = engine(["a"], ["b", "c"])
    assert asyncio.run(gathered(made)) == [["a"], ["b", "c"]] and stream.cancelled == 0


@pytest.mark.parametrize("error", ENDED)
@pytest.mark.parametrize("before", [[], [["a"]]])
def test_a_replica_that_ends_is_503_with_no_word_of_its_error(before, error, caplog):
    made, stream = engine(*before, error)
    with pytest.raises(Refusal) as caught:
        asyncio.run(gathered(made))
    assert (caught.value.status, caught.value.code) == (503, "engine_error")
    assert "secret" not in str(caught.value.body()) and stream.cancelled == 1
    assert repr(error) in caplog.text


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


CALLS = ("admit", "settle", "withdraw", "renew", "refused", "metrics")


def remote(desk):
    """A desk behind a handle."""
    return Handle(**{name: getattr(desk, name) for name in CALLS})


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
        desk = RemoteDesk(Handle(**dict.fromkeys(CALLS, gone)))
        await desk.settle(OUTCOME)
        await desk.refused("web", 400)
        await desk.withdraw("t")
        for call in (desk.admit(ASKED), desk.metrics()):
            with pytest.raises(Refusal) as caught:
                await call
            assert caught.value.status == 503 and caught.value.retry_after_s

    asyncio.run(scenario())


def test_a_desk_is_told_which_requests_are_still_being_answered():
    told = []

    class Counting(Desk):
        async def renew(self, tickets):
            told.append(tickets)
            await super().renew(tickets)

    async def hears():
        """The next that the desk is told, in patience."""
        told.clear()
        async with asyncio.timeout(30):
            while not told:
                await asyncio.sleep(0.01)
        return told[0]

    async def scenario():
        desk = RemoteDesk(remote(Counting({"m": 2})), renew_s=0.02)
        for ticket in ("t", "u"):
            assert await desk.admit(ASKED._replace(ticket=ticket)) is None
        assert await hears() == ["t", "u"]
        await desk.settle(OUTCOME)
        assert await hears() == ["u"]
        await desk.withdraw("u")
        told.clear()
        await asyncio.sleep(0.1)
        assert not told  # nothing to tell, and nobody who wakes up for it
        assert await desk.admit(ASKED._replace(ticket="v")) is None
        assert await hears() == ["v"]

    asyncio.run(scenario())


class Hanging:
    """A call that the desk does not answer, or `after_s` later."""

    def __init__(self, after_s=60.0):
        self.after_s, self.cancelled, self.done = after_s, 0, False

    def __await__(self):
        yield from asyncio.sleep(self.after_s).__await__()
        self.done = True

    def cancel(self):
        self.cancelled += 1


def test_a_desk_that_hangs_refuses_new_requests_and_holds_up_no_answer(caplog):
    calls = {name: Hanging() for name in CALLS}

    async def scenario():
        handle = Handle(**{name: lambda *_, call=call: call for name, call in calls.items()})
        desk = RemoteDesk(handle, timeout_s=0.05)
        await desk.settle(OUTCOME)
        await desk.refused("web", 400)
        for ask in (desk.admit(ASKED), desk.metrics()):
            with pytest.raises(Refusal) as caught:
                await ask
            assert (caught.value.status, caught.value.code) == (503, "desk_error")
        assert caplog.text.count("was not told of a request: TimeoutError") == 2
        await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(scenario(), 5))
    assert calls["admit"].cancelled == 1  # else it would take a request in that is not there any more
    assert calls["settle"].cancelled == calls["withdraw"].cancelled == 0
    assert caplog.text.count("was not told of a request: TimeoutError") == 3  # that the one which it may yet take in is gone


class Slow:
    """A call of a desk that takes it in after `before_s` and answers `after_s` later, whoever still waits for it."""

    def __init__(self, work, before_s, after_s, error=None):
        self.error, self.cancelled = error, 0
        self._task = asyncio.ensure_future(self._done(work, before_s, after_s))

    async def _done(self, work, before_s, after_s):
        await asyncio.sleep(before_s)
        found = await work
        await asyncio.sleep(after_s)
        return found

    def __await__(self):
        if self.error is not None:
            yield from asyncio.sleep(0.02).__await__()
            raise self.error
        return (yield from asyncio.shield(self._task).__await__())

    def cancel(self):  # too late, as for a replica that has begun
        self.cancelled += 1


@pytest.mark.parametrize("before_s, after_s", [(0.0, 0.15), (0.15, 0.0)])  # the withdrawal comes after it or before it
@pytest.mark.parametrize("how", ["late", "cancelled by ray", "caller left"])
def test_a_place_that_a_desk_gives_too_late_is_given_back(before_s, after_s, how):
    desk, inside, seen = Desk({"m": 1}), contextvars.ContextVar("request", default=None), []

    def withdraw(ticket):
        seen.append((ticket, inside.get()))
        return desk.withdraw(ticket)

    async def scenario():
        error = asyncio.CancelledError() if how == "cancelled by ray" else None  # it cancels calls of a request that is gone
        calls = {name: getattr(desk, name) for name in CALLS} | {"withdraw": withdraw}
        calls["admit"] = lambda asked: Slow(desk.admit(asked), before_s, after_s, error)
        far = RemoteDesk(Handle(**calls), timeout_s=0.05 if how == "late" else 5.0)
        inside.set("a request")
        task = asyncio.ensure_future(far.admit(ASKED))
        await asyncio.sleep(0.03)
        if how == "caller left":
            task.cancel()
        with pytest.raises(Refusal if how == "late" else asyncio.CancelledError):
            await task
        await asyncio.sleep(0.2)
        return desk._limits.in_flight(), await desk.admit(ASKED._replace(ticket="u")), await desk.metrics()

    held, next_one, metrics = asyncio.run(scenario())
    assert held == 0 and next_one is None and seen == [("t", None)]
    assert b"ctrlray_requests_total{" not in metrics  # no engine saw it


def test_a_caller_who_leaves_meanwhile_is_not_admitted_later_and_is_settled():
    admitting, settling, inside = Hanging(), Hanging(0.1), contextvars.ContextVar("request", default=None)
    seen = []

    def settle(outcome):
        seen.append(inside.get())  # Ray Serve cancels calls that are made in the context of the request which it cancels
        return settling

    async def scenario():
        calls = dict.fromkeys(CALLS, silent) | {"admit": lambda _: admitting, "settle": settle}
        desk = RemoteDesk(Handle(**calls))
        inside.set("a request")
        for call in (desk.admit(ASKED), desk.settle(OUTCOME)):
            task = asyncio.ensure_future(call)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.sleep(0.2)

    asyncio.run(scenario())
    assert admitting.cancelled == 1 and settling.done and settling.cancelled == 0 and seen == [None]


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


@pytest.mark.parametrize("problem", [ActorDiedError(), OSError("as it comes over gRPC"), None])
def test_a_reward_that_is_not_there_is_503(problem):
    with pytest.raises(Refusal) as caught:
        judge({"harm": [0.0, 0.0], "calm": [0.0, 0.0]}, problem, timeout_s=0.2)
    assert (caught.value.status, caught.value.code) == (503, "reward_error")


@pytest.mark.parametrize("why", ["the caller leaves", "time is up", "another reward fails"])
def test_scoring_that_nobody_waits_for_ends(why):
    calls = [Hanging(), Hanging()]
    handles = [Handle(score=lambda *_, call=call: call) for call in calls]
    if why == "another reward fails":

        async def fails(chats, texts):
            raise ActorDiedError

        handles.append(Handle(score=fails))
    made = RewardJudge(handles, CONTROL, SCALES, 0.1 if why == "time is up" else 5.0)

    async def scenario():
        asking = asyncio.ensure_future(made.units([{"role": "user", "content": "Hi"}], ["a"]))
        await asyncio.sleep(0.03)
        if why == "the caller leaves":
            asking.cancel()
        return await asking

    with pytest.raises(asyncio.CancelledError if why == "the caller leaves" else Refusal):
        asyncio.run(scenario())
    assert all(call.cancelled for call in calls)


def test_a_reward_that_gave_a_call_up_is_503():
    async def score(chats, texts):
        raise asyncio.CancelledError

    with pytest.raises(Refusal) as caught:
        asyncio.run(RewardJudge([Handle(score=score)], CONTROL, SCALES, 5.0).units([{"role": "user", "content": "Hi"}], ["a"]))
    assert caught.value.code == "reward_error"


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

    batches, times = unhurried(scenario())
    assert batches == [[1], [2, 3], [4]] and times[0] < 0.1 <= times[1]


def test_each_comes_at_once_until_there_is_something_to_see():
    async def scenario():
        begun = asyncio.get_running_loop().time()
        seen = []
        async for batch in coalesce(paced((0, ""), (0.01, ""), (0.01, "a"), (0.01, "b"), (0.01, "c")), lambda: 0.2, bool):
            seen.append((batch, asyncio.get_running_loop().time() - begun))
        return seen

    (first, _), (second, _), (third, third_s), (rest, rest_s) = unhurried(scenario())
    assert (first, second, third, rest) == ([""], [""], ["a"], ["b", "c"]) and third_s < 0.15 and third_s < rest_s
    assert asyncio.run(all_of(coalesce(paced((0, ""), (0, "")), lambda: 0.2, bool))) == [[""], [""]]


async def all_of(batches):
    return [batch async for batch in batches]


def test_many_streams_on_few_cores_send_less_often():
    assert pause_s(0.1, 1, 2) == pause_s(0.1, 3, 2) == 0.1
    assert pause_s(0.1, 12, 2) == 0.4 and pause_s(0.1, 12, 16) == 0.1


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
