"""What a request must pass before anything reads it: a key, a size, and a pace. Plain ASGI, around the whole application.

A caller without a key is answered before any byte of the body is read, but for a small one that came along, and pages that need
no key take no body; a body that is too long is refused by its declared length, or where the limit is reached; a body that
trickles in is given up. One key can fill neither the memory with bodies nor the time with requests that are refused.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ctrlray.serve.aside import aside
from ctrlray.serve.entrance import BODY, App, Message, Receive, Scope, Send, again
from ctrlray.serve.limits import Faults
from ctrlray.serve.policy import Key
from ctrlray.serve.refusal import OVER_LIMIT, Refusal

_FAULTS = frozenset({400, 403, 404, 405, 408, 413})
"""What a request is refused with for what it is, whenever it comes."""
_BODIES_WAIT_S = 5


class Left(Exception):
    """The caller went away."""


@dataclass
class _Upload:
    """A request's body as far as it is here."""

    key: Key | None = None
    parts: list[bytes] = field(default_factory=list)
    size: int = 0


class Guard:
    """`caller` gives the key of an Authorization header or raises a Refusal; `public` says which paths need none.

    Bodies of `max_body_bytes` and more are refused; `max_held_bytes` is what those of one key may have here together.
    """

    def __init__(
        self,
        app: App,
        caller: Callable[[str | None], Key],
        public: Callable[[str], bool],
        refused: Callable[[str, int], Awaitable[None]],
        max_body_bytes: int,
        body_timeout_s: float,
        max_held_bytes: int,
    ) -> None:
        self._app = app
        self._caller = caller
        self._public = public
        self._refused = refused
        self._most_bytes = max_body_bytes - 1
        self._body_timeout_s = body_timeout_s
        self._max_held_bytes = max_held_bytes
        self._held: Counter[str] = Counter()
        self._faults = Faults()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through with its key in `scope["state"]["key"]` and its body read, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        upload = _Upload()
        if (body := scope.pop(BODY, None)) is not None:
            receive = again(_whole(body), receive)
        try:
            try:
                body = await self._let_in(scope, receive, upload)
            except Refusal as refusal:
                aside(self._refused(upload.key.name if upload.key else "", refusal.status))
                await respond(self._noting(upload.key, scope, send), refusal, close=refusal.status in (401, 408, 413))
                return
            await self._app(scope, again(_whole(body), receive), self._noting(upload.key, scope, send))
        except Left:
            return
        finally:
            self._drop(upload)

    async def _let_in(self, scope: Scope, receive: Receive, upload: _Upload) -> bytes:
        """The body of a request that may come in."""
        headers = {bytes(k).lower(): bytes(v).decode("latin-1") for k, v in scope["headers"]}
        public = self._public(scope["path"])
        if not public:
            upload.key = self._caller(headers.get(b"authorization"))
            scope.setdefault("state", {})["key"] = upload.key
            if wait := self._faults.check(upload.key, time.monotonic()):
                raise Refusal(429, wait.message, code=OVER_LIMIT, retry_after_s=wait.retry_after_s)
        return await self._body(headers.get(b"content-length"), receive, upload, 0 if public else self._most_bytes)

    async def _body(self, declared: str | None, receive: Receive, upload: _Upload, most: int) -> bytes:
        if declared is not None and (not declared.isdecimal() or int(declared[:20]) > most):
            raise _too_large(most)
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Left
                    self._hold(upload, message.get("body", b""), most)
                    if not message.get("more_body", False):
                        body = b"".join(upload.parts)
                        upload.parts.clear()
                        return body
        except TimeoutError:
            message_text = f"the body did not arrive within {self._body_timeout_s:g} s"
            raise Refusal(408, message_text, code="body_timeout") from None

    def _hold(self, upload: _Upload, part: bytes, most: int) -> None:
        if upload.size + len(part) > most:
            raise _too_large(most)
        name = upload.key.name if upload.key else ""
        if self._held[name] + len(part) > self._max_held_bytes:
            message = f"the requests of your key hold {self._max_held_bytes} bytes already; wait for some to be answered"
            raise Refusal(429, message, code="bodies_too_large", retry_after_s=_BODIES_WAIT_S)
        upload.parts.append(part)
        upload.size += len(part)
        self._held[name] += len(part)

    def _drop(self, upload: _Upload) -> None:
        name = upload.key.name if upload.key else ""
        self._held[name] -= upload.size
        if not self._held[name]:
            del self._held[name]

    def _noting(self, key: Key | None, scope: Scope, send: Send) -> Send:
        """`send`, which also counts what the key is refused for what it asks, or by the application for how much.

        Refusals here for how much cost next to nothing, and counting them would prolong the very wait that they tell of.
        """
        if key is None or key.requests_per_minute is None:
            return send

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and (message["status"] in _FAULTS or scope["state"].get("over_limit")):
                self._faults.count(key, time.monotonic())
            await send(message)

        return noted


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is longer than {limit} bytes", code="body_too_large")


def _whole(body: bytes) -> Message:
    return {"type": "http.request", "body": body, "more_body": False}


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
