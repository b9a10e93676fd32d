"""The ingress under load and faults: limits, callers who leave, replicas that die, bodies that are long or slow."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from ctrlray.serve.policy import Bounds, Key, Policy, hashed
from ctrlray.serve.refusal import Refusal
from tests.fakes import FakeJudge
from tests.ingress import CHAT, World, ask, events


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
    assert 'ctrlray_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'ctrlray_refused_total{key="web",status="400"} 1.0' in text
    assert 'ctrlray_refused_total{key="",status="401"} 1.0' in text
    assert "ck-web" not in text


def test_open_metrics(world):
    world.policy = world.policy.model_copy(update={"metrics": "open"})
    assert world.client(None).get("/metrics").status_code == 200


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def send_body(app, messages, headers=()):
    """Drive the application by hand; messages are (delay in s, ASGI message). Returns what it sent."""
    sent, waiting = [], iter(messages)

    async def receive():
        delay, message = next(waiting, (60, None))
        await asyncio.sleep(delay)
        return message

    async def send(message):
        sent.append(message)

    pairs = [(b"authorization", b"Bearer ck-web"), (b"content-type", b"application/json"), *headers]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"", "headers": pairs}
    await app(scope, receive, send)
    return sent


def body_part(content: bytes, more: bool):
    return {"type": "http.request", "body": content, "more_body": more}


def test_long_bodies_are_refused_early():
    world = World(max_body_bytes=1000)
    declared = run(send_body(world.app, [], [(b"content-length", b"1001")]))  # not a byte of it was read
    assert declared[0]["status"] == 413 and (b"connection", b"close") in declared[0]["headers"]
    endless = [(0, body_part(b"x" * 600, True))] * 9
    assert run(send_body(world.app, endless))[0]["status"] == 413


def test_bodies_that_trickle_in_are_given_up():
    world = World(body_timeout_s=0.3)
    sent = run(send_body(world.app, [(0.1, body_part(b" ", True))] * 50))
    assert sent[0]["status"] == 408 and b"body_timeout" in sent[1]["body"]


def test_unknown_callers_are_answered_before_their_body():
    world = World()
    world.policy = Policy(keys=(Key(name="other", hash=hashed("x")),))
    sent = run(send_body(world.app, []))
    assert sent[0]["status"] == 401 and (b"connection", b"close") in sent[0]["headers"]  # the rest of it is not waited for


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
        await asyncio.sleep(0.2)
        assert world.in_flight == 1
        task.cancel()
        await asyncio.wait({task})
        return world

    world = run(scenario())
    assert world.in_flight == 0 and world.engine.stopped == 1


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
