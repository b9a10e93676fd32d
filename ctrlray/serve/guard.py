"""What a request must pass before anything reads it: a key, a size, and a pace. Plain ASGI, around the whole application.

A caller without a key is answered before any byte of the body is read; a body that is too long is refused by its declared
length, or where the limit is reached; a body that trickles in is given up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ctrlray.serve.policy import Key
from ctrlray.serve.refusal import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Left(Exception):
    """The caller went away."""


class Guard:
    """`caller` gives the key of an Authorization header or raises a Refusal; `public` says which paths need none."""

    def __init__(
        self,
        app: App,
        caller: Callable[[str | None], Key],
        public: Callable[[str], bool],
        refused: Callable[[str, int], Awaitable[None]],
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._caller = caller
        self._public = public
        self._refused = refused
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through with its key in `scope["state"]["key"]` and its body read, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {bytes(k).lower(): bytes(v).decode("latin-1") for k, v in scope["headers"]}
        name = ""
        try:
            if not self._public(scope["path"]):
                key = self._caller(headers.get(b"authorization"))
                scope.setdefault("state", {})["key"] = key
                name = key.name
            body = await self._body(headers.get(b"content-length"), receive)
        except Refusal as refusal:
            await self._refused(name, refusal.status)
            await respond(send, refusal, close=refusal.status in (401, 408, 413))
            return
        except Left:
            return
        await self._app(scope, _replay(body, receive), send)

    async def _body(self, declared: str | None, receive: Receive) -> bytes:
        limit = self._max_body_bytes
        if declared is not None and (not declared.isdecimal() or int(declared[:20]) > limit):
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Left
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            message_text = f"the body did not arrive within {self._body_timeout_s:g} s"
            raise Refusal(408, message_text, code="body_timeout") from None


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is longer than {limit} bytes", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what really comes: the caller's leaving."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


async def respond(send: Send, refusal: Refusal, close: bool = False) -> None:
    """Answer with a refusal; `close` the connection, of which more may come that nobody wants."""
    content = encode(refusal.body())
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | refusal.headers()
    if close:
        headers["Connection"] = "close"
    pairs = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


def encode(value: Any) -> bytes:
    """JSON in ASCII: what callers sent and errors repeat may hold characters that no UTF-8 has."""
    return json.dumps(value).encode("ascii")
