"""The ingress's side of other deployments, a model's replicas and the desk: calls end with a Refusal, never an error of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.exceptions import BackPressureError

from ctrlray.serve.desk import Outcome
from ctrlray.serve.limits import UNSEEN_S, Asked, Wait
from ctrlray.serve.refusal import Refusal
from ctrlray.serve.translate import Json
from ctrlray.serve.transport import handle_options

_LOG = logging.getLogger(__name__)
_RENEW_S = UNSEEN_S / 5
_DESK_S = 10.0
"""A desk only counts: one that has not answered by then is not there."""


class ReplicaEngine:
    """A `ctrlray.serve.served.Engine` behind a deployment handle of `ctrlray.serve.server.DialServer`."""

    def __init__(self, handle: Any, timeout_s: float) -> None:
        self._call = handle.options(method_name="answer", stream=True, **handle_options())
        self._timeout_s = timeout_s

    async def answer(self, order: Json) -> AsyncGenerator[list[str], None]:
        """What the replica answers; it is cancelled, and the engine's work with it, where this generator is closed."""
        stream, ended = None, False
        try:
            stream = self._call.remote(order)
            while True:
                async with asyncio.timeout(self._timeout_s):
                    batch = await anext(stream)
                yield batch
        except StopAsyncIteration:
            ended = True
        except TimeoutError:
            message = f"no answer within {self._timeout_s:g} s; come again later"
            raise Refusal(503, message, code="engine_timeout", retry_after_s=10) from None
        except BackPressureError as error:
            raise Refusal(429, "the model's queue is full; come again later", code="queue_full", retry_after_s=5) from error
        except asyncio.CancelledError as error:
            if own_cancellation():
                raise
            raise _engine_gone(error) from error
        except Exception as error:  # over gRPC, errors of the replica come as what they were there
            raise _engine_gone(error) from error
        finally:
            if stream is not None and not ended:
                cancel(stream)


class RemoteDesk:
    """A `ctrlray.serve.desk.Desk` that is a deployment, shared by several ingress replicas.

    It is told every `_RENEW_S` which requests are still being answered here; of those that it is not told of it frees the places.
    """

    def __init__(self, handle: Any, timeout_s: float = _DESK_S, renew_s: float = _RENEW_S) -> None:
        names = ("admit", "settle", "withdraw", "renew", "refused", "metrics")
        self._calls = {name: handle.options(method_name=name, **handle_options()) for name in names}
        self._timeout_s = timeout_s
        self._telling: set[asyncio.Task[None]] = set()
        self._renew_s = renew_s
        self._mine: set[str] = set()
        """Tickets of requests that are being answered here."""
        self._renewing: asyncio.Task[None] | None = None

    async def admit(self, asked: Asked) -> Wait | None:
        """Take a request in, or say why not."""
        call = None
        try:
            call = self._calls["admit"].remote(asked)
            found = await self._in_time(call)
        except (Exception, asyncio.CancelledError) as error:
            if call is not None:
                cancel(call)
                self._start_telling("withdraw", asked.ticket)  # else a place given too late is given back by nobody
            if isinstance(error, Exception):
                raise _desk_gone("the server's limits are not there; try again", error) from error
            raise
        if found is not None:
            return Wait(*found)
        self._mine.add(asked.ticket)
        if self._renewing is None or self._renewing.done():  # in no request's context: Ray Serve cancels what is in one
            self._renewing = asyncio.get_running_loop().create_task(self._renew(), context=contextvars.Context())
        return None

    async def settle(self, outcome: Outcome) -> None:
        """A request that was admitted has ended."""
        self._mine.discard(outcome.ticket)
        await self._tell("settle", outcome)

    async def withdraw(self, ticket: str) -> None:
        """Nobody waits for this request's admission any more."""
        self._mine.discard(ticket)
        await self._tell("withdraw", ticket)

    async def refused(self, key: str, status: int) -> None:
        """A request was refused before it reached an engine."""
        await self._tell("refused", key, status)

    async def metrics(self) -> bytes:
        """Prometheus text."""
        try:
            return bytes(await self._in_time(self._calls["metrics"].remote()))
        except Exception as error:
            raise _desk_gone("the server's counts are not there; try again", error) from error

    async def _renew(self) -> None:
        await asyncio.sleep(self._renew_s)
        while self._mine:
            await self._told("renew", sorted(self._mine))
            await asyncio.sleep(self._renew_s)

    async def _in_time(self, call: Any) -> Any:
        async with asyncio.timeout(self._timeout_s):
            return await call

    async def _tell(self, name: str, *arguments: Any) -> None:
        await asyncio.shield(self._start_telling(name, *arguments))

    def _start_telling(self, name: str, *arguments: Any) -> asyncio.Task[None]:
        """Tell the desk, whatever becomes of the request: Ray Serve cancels a caller's request and all calls of its context."""
        task = asyncio.get_running_loop().create_task(self._told(name, *arguments), context=contextvars.Context())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return task

    async def _told(self, name: str, *arguments: Any) -> None:
        try:
            await self._in_time(self._calls[name].remote(*arguments))
        except Exception as error:  # a new desk knows nothing of it anyway
            _LOG.warning("the desk was not told of a request: %r", error)


def _engine_gone(error: BaseException) -> Refusal:
    _LOG.warning("an answer of a model's server ended with %r", error)
    return Refusal(503, "the model's server ended; try again", code="engine_error", retry_after_s=5)


def _desk_gone(message: str, error: Exception) -> Refusal:
    _LOG.warning("the desk did not answer: %r", error)
    return Refusal(503, message, code="desk_error", retry_after_s=5)


def own_cancellation() -> bool:
    """Whether the running task itself was cancelled; else what it waits for was, by the other side."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def cancel(call: Any) -> None:
    """Cancel a call. Ray raises from here what kept the call from reaching any replica; the caller knows it already."""
    with contextlib.suppress(Exception):
        call.cancel()
