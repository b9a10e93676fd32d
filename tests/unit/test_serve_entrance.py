"""What the proxy does before Ray reads a request: headers that steer Ray, and small bodies that come along."""

from __future__ import annotations

import asyncio
import json
import pickle

import pytest

from ctrlray.serve.edge import install
from ctrlray.serve.entrance import BODY, MOST_BYTES, Entrance
from tests.ingress import World, ask, body_part, run, send_body

CONTENT = json.dumps(ask()).encode()


def announced(content=CONTENT):
    return (b"Content-Length", str(len(content)).encode())


class Proxy:
    """Stands for Ray's: keeps the scope that it would send on, and how often the body was asked for behind it."""

    def __init__(self, app=None):
        self.app, self.scope, self.received = app, None, []

    async def __call__(self, scope, receive, send):
        async def counted():
            message = await receive()
            self.received.append(message)
            return message

        self.scope = pickle.loads(pickle.dumps(scope))
        if self.app:
            await self.app(pickle.loads(pickle.dumps(scope)), counted, send)


def passed(headers, messages=(), **more):
    """The scope as it is passed on."""
    return passed_after(headers, messages, **more)[0]


def passed_after(headers, messages=(), **more):
    """The scope as it is passed on, and how often something was received before that."""
    proxy, asked = Proxy(), []

    async def app(scope, receive, send):
        async def noted():
            asked.append(True)
            return await receive()

        await Entrance(proxy)(scope, noted, send)

    run(send_body(app, messages, headers, **more))
    return proxy.scope, len(asked)


def test_a_small_body_is_answered_without_being_asked_for():
    world, leaves = World(), (60, {"type": "http.disconnect"})
    proxy = Proxy(world.app)
    sent = run(send_body(Entrance(proxy), [(0, body_part(CONTENT)), leaves], [announced()]))
    assert sent[0]["status"] == 200 and json.loads(sent[1]["body"])["choices"]
    assert proxy.scope[BODY] == CONTENT and proxy.received in ([], [body_part(CONTENT)])


def test_other_applications_receive_it_as_ever():
    async def other(scope, receive, send):
        proxy.received.append(await receive())

    proxy = Proxy()
    proxy.app = other
    run(send_body(Entrance(proxy), [(0, body_part(CONTENT))], [announced()]))
    assert proxy.received == [body_part(CONTENT)] * 2  # once counted as asked for, once as taken


@pytest.mark.parametrize(
    "messages",
    [
        [(0, body_part(CONTENT[:9], True)), (0, body_part(CONTENT[9:]))],
        [(0.2, body_part(CONTENT))],
    ],
    ids=["in parts", "late"],
)
def test_what_is_not_there_at_once_is_received_as_ever(messages):
    proxy = Proxy(World().app)
    sent = run(send_body(Entrance(proxy), messages, [announced()]))
    assert sent[0]["status"] == 200 and BODY not in proxy.scope
    assert b"".join(m["body"] for m in proxy.received) == CONTENT


@pytest.mark.parametrize(
    "headers, more",
    [
        ([announced()], {"key": None}),
        ([announced(), (b"Expect", b"100-continue")], {}),
        ([(b"Content-Length", str(MOST_BYTES + 1).encode())], {}),
        ([(b"Content-Length", b"9" * 5000)], {}),
        ([(b"Content-Length", b"-1")], {}),
        ([(b"Content-Length", b"0")], {}),
        ([(b"Transfer-Encoding", b"chunked")], {}),
    ],
)
def test_no_byte_is_read_of_other_bodies(headers, more):
    scope, asked = passed_after(headers, [(0, body_part(CONTENT))], **more)
    assert BODY not in scope and asked == 0


def test_a_caller_who_leaves_before_the_body_is_seen_by_the_guard():
    proxy = Proxy(World().app)
    assert run(send_body(Entrance(proxy), [(0, {"type": "http.disconnect"})], [announced()])) == []
    assert proxy.received == [{"type": "http.disconnect"}]


def test_a_body_that_came_along_has_the_limits_of_others():
    world = World(max_body_bytes=len(CONTENT))
    sent = run(send_body(Entrance(Proxy(world.app)), [(0, body_part(CONTENT))], [announced()]))
    assert sent[0]["status"] == 413
    sent = run(send_body(Entrance(Proxy(world.app)), [(0, body_part(CONTENT))], [announced()], key="ck-wrong"))
    assert sent[0]["status"] == 401 and world.engine.orders == []


@pytest.mark.parametrize(
    "name",
    [
        "serve_multiplexed_model_id",
        "Serve-Multiplexed-Model-Id",
        "X-Session-Id",
        "x_session_id",
        "x-request-timeout-seconds",
        "X-Request-Disconnect-Disabled",
    ],
)
@pytest.mark.parametrize("value", [b"1", b"\xff"])
def test_headers_that_steer_ray_go(name, value):
    others = [(b"X-Control", b"safety=1")]
    assert passed([(name.encode(), value), *others])["headers"] == passed(others)["headers"]


@pytest.mark.parametrize(
    "value, stays", [(b"a-1.b_2:C", True), (b"\xff", False), (b"x" * 129, False), (b"", False), (b"a b", False)]
)
def test_request_ids_are_short_and_plain(value, stays):
    assert ((b"x-request-id", value) in passed([(b"X-Request-Id", value)])["headers"]) == stays


@pytest.mark.parametrize("root", ["", "/x"])
def test_what_is_deployed_is_told_to_nobody(root):
    async def app(scope, receive, send):
        await Entrance(Proxy())(scope | {"root_path": root}, receive, send)

    sent = run(send_body(app, [], path=f"{root}/-/routes"))
    assert sent[0]["status"] == 404


def test_headers_of_web_sockets_go_too():
    proxy = Proxy()
    scope = {"type": "websocket", "path": "/", "headers": [(b"x-session-id", b"\xff"), (b"host", b"x")]}
    run(Entrance(proxy)(scope, None, None))
    assert proxy.scope["headers"] == [(b"host", b"x")]


def test_the_start_of_a_server_passes():
    async def started():
        seen = []

        async def app(scope, receive, send):
            seen.append(scope)

        await Entrance(app)({"type": "lifespan"}, None, None)
        return seen

    assert asyncio.run(started()) == [{"type": "lifespan"}]


def test_proxies_have_it(monkeypatch):
    import uvicorn.protocols.http.auto as chosen

    monkeypatch.setattr(chosen, "AutoHTTPProtocol", None)
    (middleware,) = install()
    assert middleware.cls is Entrance
