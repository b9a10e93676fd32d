"""Streams between processes: what comes faster than messages should be sent travels together, and joined where it can be."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Json = dict[str, Any]
_PER_CORE = 15


def pause_s(least_s: float, num_streams: int, num_cores: int) -> float:
    """Time between a stream's messages: `least_s`, longer where many streams share few cores.

    A message costs the same whatever it holds, 2 to 3 ms of one core over all processes that it passes, so that a core's worth of
    `_PER_CORE` messages a second leaves nineteen twentieths of it to the engine.
    """
    return max(least_s, num_streams / (_PER_CORE * num_cores))


async def coalesce(
    items: AsyncGenerator[T, None], interval_s: Callable[[], float], shows: Callable[[T], bool] = lambda item: True
) -> AsyncGenerator[list[T], None]:
    """Each item at once up to the first that `shows`; then what has come, at most every `interval_s()`, the last at once.

    Raises what `items` raises, after the items before it. When the consumer stops, `items` is cancelled and closed.
    """
    async with contextlib.aclosing(items):
        async for item in items:
            yield [item]
            if shows(item):
                break
        else:
            return
        async with contextlib.aclosing(_paced(items, interval_s)) as batches:
            async for batch in batches:
                yield batch


async def _paced(items: AsyncIterator[T], interval_s: Callable[[], float]) -> AsyncGenerator[list[T], None]:
    queue: asyncio.Queue[T] = asyncio.Queue()

    async def read() -> None:
        async for item in items:
            queue.put_nowait(item)

    reader = asyncio.create_task(read())
    waiting: asyncio.Future[T] | None = None
    try:
        await asyncio.wait({reader}, timeout=interval_s())
        while not (reader.done() and queue.empty()):
            waiting = asyncio.ensure_future(queue.get())
            await asyncio.wait({reader, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                break
            batch = [waiting.result()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            yield batch
            await asyncio.wait({reader}, timeout=interval_s())
        reader.result()
    finally:
        if waiting is not None:
            waiting.cancel()
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reader


async def joined(batches: AsyncGenerator[list[str], None]) -> AsyncGenerator[list[str], None]:
    """Batches of a completion's chunks, each batch by `merged`.

    Raises RuntimeError for whatever `batches` raises: its class may be one that the process at the other end cannot read.
    """
    try:
        async with contextlib.aclosing(batches):
            async for batch in batches:
                yield merged(batch)
    except Exception as error:
        raise RuntimeError(repr(error)) from error


def merged(documents: Sequence[str]) -> list[str]:
    """Chunks of a stream of vLLM's completion API, JSON each, as fewer that say the same: one of each choice.

    Texts and log-probs are joined in their order; usage, finish reason and all else are the last chunk's. What is of no choice or
    several (usage of the whole stream, an error) stays where it is: nothing is moved past it.
    """
    if len(documents) < 2:
        return list(documents)
    groups: list[list[Json]] = []
    growing: dict[int, list[Json]] = {}
    for document in map(json.loads, documents):
        choices: list[Json] = document.get("choices") or []
        group = growing.get(choices[0]["index"]) if len(choices) == 1 else None
        if group is not None:
            group.append(document)
        else:
            groups.append([document])
        if len(choices) != 1:
            growing.clear()
        elif choices[0].get("finish_reason") is not None:
            growing.pop(choices[0]["index"], None)
        elif group is None:
            growing[choices[0]["index"]] = groups[-1]
    return [json.dumps(_joined(group)) for group in groups]


def _joined(chunks: Sequence[Json]) -> Json:
    """One choice's successive chunks as one."""
    if len(chunks) == 1:
        return chunks[0]
    parts = [c["choices"][0] for c in chunks]
    choice = parts[-1] | {"text": "".join(p["text"] for p in parts), "logprobs": _all([p.get("logprobs") for p in parts])}
    return chunks[-1] | {"choices": [choice]}


def _all(logprobs: Sequence[Mapping[str, list[Any]] | None]) -> Json | None:
    """`{"tokens": [...], "token_logprobs": [...], "top_logprobs": [...], "text_offset": [...]}`, each list joined."""
    there = [found for found in logprobs if found]
    return {name: [value for found in there for value in found[name]] for name in there[0]} if there else None
