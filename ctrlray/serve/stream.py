"""Streams between processes: items that come faster than messages should be sent travel together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

T = TypeVar("T")
_PER_CORE = 30


def pause_s(least_s: float, num_streams: int, num_cores: int) -> float:
    """Time between a stream's messages: `least_s`, longer where many streams share few cores.

    A message costs the same whatever it holds, some 3 ms of one core over all processes that it passes, so that a core's worth of
    `_PER_CORE` messages a second leaves nine tenths of it to the engine.
    """
    return max(least_s, num_streams / (_PER_CORE * num_cores))


async def coalesce(items: AsyncIterator[T], interval_s: Callable[[], float]) -> AsyncIterator[list[T]]:
    """The first item at once, after it what has come, at most every `interval_s()`, and the last without waiting.

    Raises what `items` raises, after the items before it. When the consumer stops, `items` is cancelled.
    """
    queue: asyncio.Queue[T] = asyncio.Queue()

    async def read() -> None:
        async for item in items:
            queue.put_nowait(item)

    reader = asyncio.create_task(read())
    try:
        while not (reader.done() and queue.empty()):
            waiting = asyncio.ensure_future(queue.get())
            await asyncio.wait({reader, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                break
            batch = [waiting.result()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            yield batch
            await asyncio.wait({reader}, timeout=interval_s())
        reader.result()
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reader
