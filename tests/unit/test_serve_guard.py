"""What stands before the application: bodies that are long, slow or many, callers whom nobody knows, a desk that is silent."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from ctrlray.serve.policy import Key, Policy, hashed
from ctrlray.serve.refusal import Refusal
from tests.ingress import CHAT, World, ask, body_part, run, send_body, until

PADDED = json.dumps(ask()).encode() + b" " * 60_000
"""A request that holds much and says little."""


def test_long_bodies_are_refused_early():
    world = World(max_body_bytes=1000)
    declared = run(send_body(world.app, [], [(b"content-length", b"1000")]))  # not a byte of it was read
    assert declared[0]["status"] == 413 and (b"connection", b"close") in declared[0]["headers"]
    endless = [(0, body_part(b"x" * 600, True))] * 9
    assert run(send_body(world.app, endless))[0]["status"] == 413


def test_the_limit_itself_is_too_long_and_one_byte_less_is_not():
    body = json.dumps(ask()).encode()
    for size, status in ((0, 413), (1, 200)):
        world = World(max_body_bytes=len(body) + size)
        assert run(send_body(world.app, [(0, body_part(body))]))[0]["status"] == status
        declared = [(b"content-length", str(len(body)).encode())]
        assert run(send_body(world.app, [(0, body_part(body))], declared))[0]["status"] == status


def test_bodies_that_trickle_in_are_given_up():
    world = World(body_timeout_s=0.3)
    sent = run(send_body(world.app, [(0.1, body_part(b" ", True))] * 50))
    assert sent[0]["status"] == 408 and b"body_timeout" in sent[1]["body"]


def test_unknown_callers_are_answered_before_their_body():
    world = World()
    world.policy = Policy(keys=(Key(name="other", hash=hashed("x")),))
    sent = run(send_body(world.app, []))
    assert sent[0]["status"] == 401 and (b"connection", b"close") in sent[0]["headers"]  # the rest of it is not waited for


@pytest.mark.parametrize("path", ["/healthz", "/", "/docs", "/openapi.json", "/metrics"])
def test_pages_for_everybody_take_no_body(path):
    world = World()
    world.policy = world.policy.model_copy(update={"metrics": "open"})
    declared = run(send_body(world.app, [], [(b"content-length", b"1")], path, key=None))  # not a byte of it was read
    assert declared[0]["status"] == 413 and (b"connection", b"close") in declared[0]["headers"]
    endless = [(0, body_part(b"", True)), *[(0, body_part(b"x", True))] * 9]
    assert run(send_body(world.app, endless, path=path, key=None))[0]["status"] == 413
    assert run(send_body(world.app, [(0, body_part(b""))], path=path, key=None))[0]["status"] == 405
    assert world.client(None).get(path).status_code == 200


def test_the_bodies_of_one_key_are_bounded_together():
    async def scenario():
        world = World(max_held_bytes=100_000)
        world.engine.hangs = asyncio.Event()
        first = asyncio.ensure_future(send_body(world.app, [(0, body_part(PADDED))]))
        while not world.engine.orders:
            await asyncio.sleep(0.01)
        second = await send_body(world.app, [(0, body_part(PADDED))])
        small = await send_body(world.app, [(0, body_part(b"{}"))])
        other = await send_body(world.app, [(0, body_part(b"{" + PADDED))], key="ck-admin")
        world.engine.hangs.set()
        return await first, second, small, other, await send_body(world.app, [(0, body_part(PADDED))]), world.app._held

    first, second, small, other, later, held = run(scenario())
    assert [found[0]["status"] for found in (first, second, small, other, later)] == [200, 429, 400, 400, 200]
    assert b"bodies_too_large" in second[1]["body"] and (b"retry-after", b"5") in second[0]["headers"]
    assert not held  # whatever became of them


def test_uploads_that_go_on_count_as_far_as_they_are_here():
    async def scenario():
        world = World(max_held_bytes=100_000)
        leaves = asyncio.Event()
        slow = [(0, body_part(b" " * 60_000, True)), (leaves, {"type": "http.disconnect"})]
        first = asyncio.ensure_future(send_body(world.app, slow))
        await until(lambda: world.app._held)
        second = await send_body(world.app, [(0, body_part(PADDED))])
        leaves.set()
        await first
        return second, await send_body(world.app, [(0, body_part(PADDED))])

    assert [found[0]["status"] for found in run(scenario())] == [429, 200]


def test_refused_requests_count_for_the_rate():
    world = World(requests_per_minute=3)
    bad = [world.web.post(CHAT, json=ask(temperature=9)), world.web.get("/v1/nowhere"), world.web.post(CHAT, json=ask(n=17))]
    assert [r.status_code for r in bad] == [400, 404, 403]
    sent = run(send_body(world.app, []))  # not a byte of it was read
    assert sent[0]["status"] == 429 and b"mend them" in sent[1]["body"]
    assert 15 <= int(dict(sent[0]["headers"])[b"retry-after"]) <= 20
    assert world.admin.post(CHAT, json=ask(temperature=9)).status_code == 400
    assert World(requests_per_minute=1).web.post(CHAT, json=ask()).status_code == 200


def test_too_long_bodies_count_for_the_rate():
    world = World(requests_per_minute=1, max_body_bytes=1000)
    statuses = [run(send_body(world.app, [], [(b"content-length", b"5000")]))[0]["status"] for _ in range(2)]
    assert statuses == [413, 429]


@pytest.mark.parametrize("limits", [{}, {"tokens_per_minute": 100}, {"concurrent": 1}])
def test_requests_beyond_the_key_s_limits_are_soon_refused_before_they_are_read(limits):
    """Each is rendered before it is known to be too much."""

    async def scenario():
        world = World(requests_per_minute=3, **limits)
        goes_on = asyncio.Event()
        if "concurrent" in limits:
            world.engine.hangs = goes_on
        body = [(0, body_part(json.dumps(ask(max_tokens=50)).encode()))]
        first = asyncio.ensure_future(send_body(world.app, body))
        while not (world.engine.orders if "concurrent" in limits else first.done()):
            await asyncio.sleep(0.01)
        others = [await send_body(world.app, body) for _ in range(7)]
        last = await send_body(world.app, [])  # not a byte of it was read
        goes_on.set()
        return [await first, *others], last

    sent, last = run(scenario())
    taken = 1 if limits else 3
    assert [found[0]["status"] for found in sent] == [200] * taken + [429] * (8 - taken)
    mended = [b"mend them" in found[1]["body"] for found in sent[taken:]]
    assert mended == [False] * 3 + [True] * (5 - taken)
    assert last[0]["status"] == 429 and 15 <= int(dict(last[0]["headers"])[b"retry-after"]) <= 20  # not longer for each of them


def test_a_full_queue_is_no_fault_of_the_caller():
    world = World(requests_per_minute=2, room=0)
    refused = [world.web.post(CHAT, json=ask()) for _ in range(5)]
    assert {(r.status_code, r.json()["error"]["code"]) for r in refused} == {(429, "queue_full")}
    beyond = World(requests_per_minute=1, tokens_per_minute=100)
    codes = [beyond.web.post(CHAT, json=ask(max_tokens=50)).json().get("error", {}).get("code") for _ in range(3)]
    assert codes == [None, "rate_limit_exceeded", "rate_limit_exceeded"]


async def silent(*_):
    await asyncio.sleep(60)


async def gone(*_):
    raise Refusal(503, "the desk is not there")


@pytest.mark.parametrize("desk", [silent, gone])
def test_a_desk_that_is_not_there_delays_and_fails_no_refusal(desk, caplog):
    async def scenario():
        world = World()
        world.desk.refused = world.app._refused = desk
        unknown = await send_body(world.app, [], key="ck-none")
        bad = await send_body(world.app, [(0, body_part(b"{"))])
        await asyncio.sleep(0)
        return unknown, bad

    with caplog.at_level(logging.WARNING):
        unknown, bad = run(scenario(), timeout_s=5)
    assert unknown[0]["status"] == 401 and bad[0]["status"] == 400
    assert ("the desk is not there" in caplog.text) == (desk is gone)
