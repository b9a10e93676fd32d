"""What Ray Serve's proxy does with a request before Ray reads it: headers that would steer Ray go, a small body comes along.

Ray obeys some headers of anybody, also of who has no key: it keeps every model id that it is told to multiplex for, takes time
limits, and fails on bytes that are no UTF-8. Bodies it keeps in the proxy, which the ingress must call back for each: a small
one that is there already travels with the request too, in its scope, and `ctrlray.serve.guard` takes it from there at once.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
BODY = "ctrlray.body"
"""Key of a scope under which a whole body stands."""
MOST_BYTES = 64 * 1024
"""Of a body that comes along."""
_AT_ONCE_S = 0.05
"""A body that takes longer to arrive is left to the guard, which has a limit for it."""
_STEERING = {
    "serve_multiplexed_model_id",
    "x_request_timeout_seconds",
    "x_request_disconnect_disabled",
    os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().replace("-", "_"),
}
_REQUEST_ID = b"x-request-id"
_GOOD_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_HIDDEN = "/-/routes"
"""Tells anybody what is deployed; Ray's other route, /-/healthz, is for load balancers."""


class Entrance:
    """Middleware of a proxy."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) == _HIDDEN:
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        if "headers" in scope:
            pairs = ((bytes(name).lower(), bytes(value)) for name, value in scope["headers"])
            scope = {**scope, "headers": [(name, value) for name, value in pairs if _harmless(name, value)]}
            if scope["type"] == "http" and _small(scope["headers"]):
                receive = await _take_along(scope, receive)
        await self._app(scope, receive, send)


def _harmless(name: bytes, value: bytes) -> bool:
    if name == _REQUEST_ID:
        return _GOOD_ID.fullmatch(value) is not None
    return name.decode("latin-1").replace("-", "_") not in _STEERING


def _small(headers: Headers) -> bool:
    """Whether a body is announced that is small enough, by somebody who shows a key and does not wait to be asked for it."""
    found = dict(headers)
    size = found.get(b"content-length", b"")
    announced = size.isdigit() and 0 < int(size[:9]) <= MOST_BYTES and len(size) < 9
    return announced and b"authorization" in found and b"expect" not in found


async def _take_along(scope: Scope, receive: Receive) -> Receive:
    """Put the body into the scope where all of it is there. It is received again too: other applications do not look there."""
    try:
        async with asyncio.timeout(_AT_ONCE_S):
            message = await receive()
    except TimeoutError:
        return receive
    if message["type"] == "http.request" and not message.get("more_body", False):
        scope[BODY] = bytes(message.get("body", b""))
    return again(message, receive)


def again(message: Message, receive: Receive) -> Receive:
    """Gives a message once more, then what really comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if not given:
            given = True
            return message
        return await receive()

    return replayed
