"""What is sent back: JSON, and server-sent events that end where the caller leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi.responses import Response

from ctrlray.serve.entrance import Receive, Scope, Send
from ctrlray.serve.guard import Left, encode
from ctrlray.serve.work import LEFT, Work

T = TypeVar("T")


class Reply(Response):
    """JSON that holds whatever a caller sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """ASCII."""
        return encode(content)


class EventStream(Response):
    """Server-sent events of one piece of work, which is closed however the stream ends."""

    def __init__(self, work: Work) -> None:
        self._work = work
        fixed = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self._pairs = [(k.lower().encode(), v.encode()) for k, v in (fixed | work.headers()).items()]
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end, or until the caller leaves."""
        status = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._pairs})
            await unless_left(receive, self._send(send))
        except Left:
            status = LEFT
        except asyncio.CancelledError:
            status = LEFT
            raise
        finally:
            await self._work.close(status)

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._work.events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event.encode("ascii"), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the caller leaves. Raises Left then."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Left
        return doing.result()
    finally:
        leaving.cancel()  # not waited for: it does nothing but wait
        if not doing.done():
            doing.cancel()
            await asyncio.wait({doing})
