"""The ingress under load and faults: limits, callers who leave, replicas that die."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from ctrlray.serve.api import ChatRequest
from ctrlray.serve.policy import Bounds
from ctrlray.serve.refusal import Refusal
from tests.fakes import FakeEngine, FakeJudge
from tests.ingress import CHAT, World, ask, body_part, events, run, send_body, until


class GoneJudge:
    """Rewards whose server has ended."""

    async def units(self, turns, texts):
        raise Refusal(503, "a reward is not there; try again", code="reward_error", retry_after_s=5)


@pytest.fixture
def world():
    return World(attributes={"safety": Bounds(low=2, high=4)})


def test_rates_are_429_with_the_time_to_wait():
    world = World(requests_per_minute=1)
    assert world.web.post(CHAT, json=ask()).status_code == 200
    refused = world.web.post(CHAT, json=ask())
    assert refused.status_code == 429 and 55 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert world.admin.post(CHAT, json=ask()).status_code == 200


def test_tokens_that_were_not_taken_are_given_back():
    world = World(tokens_per_minute=400)
    for _ in range(3):
        assert world.web.post(CHAT, json=ask(max_tokens=100)).status_code == 200
    assert world.web.post(CHAT, json=ask(max_tokens=200, n=3)).status_code == 403  # more than a minute's worth


def test_max_tokens_left_out_fit_into_a_minutes_worth():
    for n in (1, 2):
        world = World(tokens_per_minute=100)
        assert world.web.post(CHAT, json=ask(n=n)).status_code == 200
        order = world.engine.orders[-1]
        assert order["max_tokens"] == (100 - len(order["prompt"][0])) // n
    assert World(tokens_per_minute=10).web.post(CHAT, json=ask()).status_code == 403  # not even the prompt fits


def test_scores_count_as_requests():
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "answer": "2x"}
    world = World(judge=FakeJudge(), requests_per_minute=1)
    statuses = [world.web.post("/v1/control/scores", json=body).status_code for _ in range(2)]
    assert statuses == [200, 429] and world.in_flight == 0
    assert 'ctrlray_tokens_total{key="web",kind="prompt",model="tiny"} 5.0' in metrics(world)  # "Hi\n2x" by characters
    body["answer"] = "x" * 500
    assert World(judge=FakeJudge()).web.post("/v1/control/scores", json=body).status_code == 400


def test_a_reward_that_is_gone_is_503_and_frees_its_place():
    world = World(judge=GoneJudge())
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "answer": "2x"}
    assert world.web.post("/v1/control/scores", json=body).status_code == 503
    for stream in (False, True):
        assert world.web.post(CHAT, json=ask(control_strategy="rerank", stream=stream)).status_code == 503
    assert world.in_flight == 0 and 'ctrlray_requests_total{key="web",model="tiny",status="503"} 3.0' in metrics(world)


def test_full_queue_is_429():
    world = World(room=0)
    refused = world.web.post(CHAT, json=ask())
    assert refused.status_code == 429 and "queue" in refused.json()["error"]["message"] and refused.headers["Retry-After"] == "5"


@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors_have_a_status(world, stream):
    world.engine.error = {"message": "bad grammar", "code": 400, "param": "response_format"}
    refused = world.web.post(CHAT, json=ask(stream=stream))
    assert refused.status_code == 400 and refused.json()["error"]["message"] == "bad grammar"
    world.engine.error = {"message": "secret path", "code": 500}
    failed = world.web.post(CHAT, json=ask(stream=stream))
    assert failed.status_code == 503 and "secret" not in failed.text and failed.headers["Retry-After"] == "1"
    assert world.in_flight == 0


def test_replica_that_dies_mid_stream_ends_it_with_an_error_event(world):
    world.engine.breaks_after = 4
    chunks = events(world.web.post(CHAT, json=ask(stream=True)))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hell"
    assert chunks[-1]["error"]["code"] == "engine_error"
    assert world.in_flight == 0 and 'ctrlray_requests_total{key="web",model="tiny",status="503"} 1.0' in metrics(world)


def metrics(world: World) -> str:
    answer = world.admin.get("/metrics")
    assert answer.status_code == 200
    return answer.text


def test_metrics_by_level_and_model(world):
    world.web.post(CHAT, json=ask(control={"safety": 3}))
    world.web.post(CHAT, json=ask(stream=True))
    world.web.post(CHAT, json=ask(control={"safety": 9}))
    world.client(None).post(CHAT, json=ask())
    text = metrics(world)
    assert 'ctrlray_requests_total{key="web",model="tiny",status="200"} 2.0' in text
    assert 'ctrlray_request_seconds_count{attribute="safety",level="3",model="tiny"} 1.0' in text
    assert 'ctrlray_level_tokens_total{attribute="helpfulness",level="2",model="tiny"} 22.0' in text
    assert 'ctrlray_level_requests_total{attribute="safety",level="3",model="tiny",status="200"} 1.0' in text
    assert 'ctrlray_level_requests_total{attribute="helpfulness",level="2",model="tiny",status="200"} 2.0' in text
    assert 'ctrlray_level_first_token_seconds_count{attribute="safety",level="4",model="tiny"} 1.0' in text
    assert 'ctrlray_level_first_token_seconds_count{attribute="safety",level="3"' not in text  # that one was no stream
    assert not [line for line in text.splitlines() if line.startswith("ctrlray_level") and "key=" in line]
    assert 'ctrlray_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'ctrlray_refused_total{key="web",status="400"} 1.0' in text
    assert 'ctrlray_refused_total{key="",status="401"} 1.0' in text
    assert "ck-web" not in text


@pytest.mark.parametrize("stream", [True, False])
def test_what_an_engine_saw_is_not_counted_as_refused(world, stream):
    world.engine.error = {"message": "no", "code": 400}
    assert world.web.post(CHAT, json=ask(stream=stream)).status_code == 400
    text = metrics(world)
    assert 'ctrlray_requests_total{key="web",model="tiny",status="400"} 1.0' in text
    assert 'ctrlray_refused_total{key="web"' not in text


def test_open_metrics(world):
    world.policy = world.policy.model_copy(update={"metrics": "open"})
    assert world.client(None).get("/metrics").status_code == 200 == world.web.get("/metrics").status_code


def test_metrics_are_for_keys_that_the_policy_marks(world):
    """They show what all keys are called and how much they ask."""
    refused = world.web.get("/metrics")
    assert refused.status_code == 403 and "metrics: true" in refused.json()["error"]["message"] and "admin" not in refused.text
    assert World(metrics=True).web.get("/metrics").status_code == 200


def test_a_broken_policy_file_shows_in_metrics(world):
    assert "\nctrlray_policy_file_broken 0.0\n" in metrics(world)
    world.problem = "no key"
    assert "\nctrlray_policy_file_broken 1.0\n" in metrics(world)


def test_plain_completions_have_no_levels_in_metrics(world):
    world.admin.post("/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True})
    text = metrics(world)
    assert 'ctrlray_first_token_seconds_count{model="tiny"} 1.0' in text and "ctrlray_level_requests_total{" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_frees_the_place_and_the_engine(stream):
    async def scenario():
        world = World()
        world.engine.hangs = asyncio.Event()
        body = json.dumps(ask(stream=stream)).encode()
        await send_body(world.app, [(0, body_part(body, False)), (0.1, {"type": "http.disconnect"})])
        return world

    world = run(scenario())
    assert world.in_flight == 0 and world.engine.stopped == 1 and len(world.engine.orders) == 1
    assert 'status="499"} 1.0' in metrics(world)


RERANKED = {"control_strategy": "rerank", "candidates": 2, "max_tokens": 100}


@pytest.mark.parametrize(
    "fields, kept", [({}, True), ({"stream": True}, False), (RERANKED, True), (RERANKED | {"stream": True}, True)]
)
@pytest.mark.parametrize("how", ["left", "died"])
def test_an_answer_that_nobody_counted_costs_what_was_set_aside(fields, kept, how):
    """An engine may have made all of a whole answer; of a stream it has said how far it got."""

    async def scenario():
        world = World(judge=FakeJudge(), tokens_per_minute=300)
        messages = [(0, body_part(json.dumps(ask(max_tokens=200) | fields).encode(), False))]
        if how == "left":
            world.engine.hangs = asyncio.Event()
            messages.append((0.1, {"type": "http.disconnect"}))
        else:
            world.engine.error = {"message": "died", "code": 500}
        sent = await send_body(world.app, messages)
        world.engine.hangs = world.engine.error = None
        return world, sent

    world, sent = run(scenario())
    assert len(world.engine.orders) == 1 and world.in_flight == 0 and (how == "left" or sent[0]["status"] == 503)
    assert 'kind="completion",model="tiny"} 0.0' in metrics(world)  # which tells what was seen
    assert world.web.post(CHAT, json=ask(max_tokens=200)).status_code == (429 if kept else 200)


def test_an_answer_whose_scoring_failed_costs_its_tokens():
    world = World(judge=GoneJudge(), tokens_per_minute=300)
    assert world.web.post(CHAT, json=ask(**RERANKED)).status_code == 503
    assert 'ctrlray_tokens_total{key="web",kind="completion",model="tiny"} 22.0' in metrics(world)
    assert world.web.post(CHAT, json=ask(max_tokens=200)).status_code == 200


def test_a_caller_who_leaves_mid_stream():
    async def scenario():
        world = World()
        world.engine.texts = ["x" * 300]
        body = json.dumps(ask(stream=True)).encode()
        sent = await send_body(world.app, [(0, body_part(body, False)), (0, {"type": "http.disconnect"})])
        return world, sent

    world, _ = run(scenario())
    assert world.in_flight == 0 and world.engine.stopped == 1


def test_task_that_is_cancelled_settles():
    """Ray Serve cancels the handler when the caller is gone."""

    async def scenario():
        world = World()
        world.engine.hangs = asyncio.Event()
        body = json.dumps(ask()).encode()
        task = asyncio.ensure_future(send_body(world.app, [(0, body_part(body, False))]))
        await until(lambda: world.engine.orders)
        assert world.in_flight == 1
        task.cancel()
        await asyncio.wait({task})
        return world

    world = run(scenario())
    assert world.in_flight == 0 and world.engine.stopped == 1


def test_an_answer_that_is_being_read_is_closed_and_settled():
    """A caller's leaving comes twice, as a message and as a cancellation, and the second may find the first at work."""

    async def scenario():
        world = World()
        world.engine.hangs = asyncio.Event()
        work = await world.front.chat(ChatRequest.model_validate(ask(stream=True)), world.policy.keys[0], {})
        reading = asyncio.ensure_future(work.begin())
        await asyncio.sleep(0.05)
        assert world.in_flight == 1
        await work.close(499)
        assert world.in_flight == 0
        reading.cancel()
        await asyncio.wait({reading})
        return world

    assert run(scenario()).engine.stopped == 1


class FarDesk:
    """A desk in another process: what it was asked for, it does, whoever still waits for the answer."""

    def __init__(self, desk):
        self.desk, self.decides, self.asked = desk, asyncio.Event(), []
        self.settle, self.withdraw, self.refused, self.metrics = desk.settle, desk.withdraw, desk.refused, desk.metrics

    async def admit(self, asked):
        async def later():
            await self.decides.wait()
            return await self.desk.admit(asked)

        self.asked.append(asyncio.ensure_future(later()))
        return await asyncio.shield(self.asked[-1])


SCORED = {"model": "tiny", "messages": ask()["messages"], "answer": "2x"}


@pytest.mark.parametrize(
    "path, body", [(CHAT, ask()), ("/v1/completions", {"model": "tiny", "prompt": "x"}), ("/v1/control/scores", SCORED)]
)
@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("room", [9, 0])
def test_a_caller_who_leaves_while_the_desk_decides_frees_the_place(path, body, decided, room):
    async def scenario():
        world = World(judge=FakeJudge(), completions=True, room=room)
        world.front.desk = FarDesk(world.desk)
        task = asyncio.ensure_future(send_body(world.app, [(0, body_part(json.dumps(body).encode()))], path=path))
        await until(lambda: world.front.desk.asked)
        if decided:
            world.front.desk.decides.set()  # the answer is on its way as the caller leaves
        task.cancel()
        await asyncio.wait({task})
        world.front.desk.decides.set()
        await asyncio.gather(*world.front.desk.asked)
        await until(lambda: not world.in_flight)
        return world

    world = run(scenario())
    assert len(world.front.desk.asked) == 1 and world.in_flight == 0 and world.engine.orders == []
    assert ('ctrlray_requests_total{key="web",model="tiny",status="499"} 1.0' in metrics(world)) == (room > 0)


def client(world, key="ck-web"):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=world.app), base_url="http://x", headers=headers)




class OpenEngine(FakeEngine):
    """Sends the first token of a stream, and the rest when `goes_on` is set."""

    def __init__(self):
        super().__init__()
        self.goes_on, self.begun = asyncio.Event(), 0

    async def answer(self, order):
        async for batch in super().answer(order):
            yield batch
            self.begun += 1
            await self.goes_on.wait()


def test_a_stream_that_is_open_counts_as_a_request():
    async def scenario():
        world = World(concurrent=1, engine=OpenEngine())
        async with client(world) as web:
            first = asyncio.ensure_future(web.post(CHAT, json=ask(stream=True)))
            await until(lambda: world.engine.begun)
            refused = [await web.post(CHAT, json=ask(stream=stream)) for stream in (True, False)]
            world.engine.goes_on.set()
            return (await first).text, refused, await web.post(CHAT, json=ask(stream=True))

    first, refused, later = run(scenario())
    assert "data: [DONE]" in first and later.status_code == 200
    assert [r.status_code for r in refused] == [429, 429] and "concurrent=1" in refused[0].json()["error"]["message"]


def test_the_queue_fills_says_so_and_empties():
    async def scenario():
        world = World(room=2)
        world.engine.hangs = asyncio.Event()
        async with client(world) as web, client(world, "ck-admin") as admin:
            waiting = [asyncio.ensure_future(c.post(CHAT, json=ask())) for c in (web, admin)]
            await until(lambda: len(world.engine.orders) == 2)
            refused = [await c.post(CHAT, json=ask()) for c in (web, admin)]  # it is of all keys
            world.engine.hangs.set()
            answered = await asyncio.gather(*waiting)
            return world, refused, answered, [await web.post(CHAT, json=ask()) for _ in range(3)]

    world, refused, answered, later = run(scenario())
    assert [r.status_code for r in refused] == [429, 429] and all(int(r.headers["Retry-After"]) > 0 for r in refused)
    assert "the queue of 'tiny' is full (2 requests)" in refused[0].json()["error"]["message"]
    assert {r.status_code for r in [*answered, *later]} == {200} and len(world.engine.orders) == 5 and world.in_flight == 0


def test_concurrent_requests_of_a_key_are_bounded():
    async def scenario():
        world = World(concurrent=1)
        world.engine.hangs = asyncio.Event()
        transport = httpx.ASGITransport(app=world.app)
        headers = {"Authorization": "Bearer ck-web"}
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            first = asyncio.ensure_future(client.post(CHAT, json=ask()))
            while not world.engine.orders:
                await asyncio.sleep(0.01)
            second = await client.post(CHAT, json=ask())
            world.engine.hangs.set()
            return (await first).status_code, second

    status, second = run(scenario())
    assert status == 200 and second.status_code == 429 and "concurrent=1" in second.json()["error"]["message"]
