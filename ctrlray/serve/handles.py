"""The ingress's side of other deployments, a model's replicas and the desk: calls end with a Refusal, never an error of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from ctrlray.serve.desk import Outcome
from ctrlray.serve.limits import Asked, Wait
from ctrlray.serve.refusal import Refusal
from ctrlray.serve.translate import Json

_LOG = logging.getLogger(__name__)
GONE = (RayError, RayServeException)
"""What a call ends with when the actor behind it ended, or its method raised."""


class ReplicaEngine:
    """A `ctrlray.serve.served.Engine` behind a deployment handle of `ctrlray.serve.server.DialServer`."""

    def __init__(self, handle: Any, timeout_s: float) -> None:
        self._handle = handle.options(stream=True)
        self._timeout_s = timeout_s

    async def answer(self, order: Json) -> AsyncGenerator[list[str], None]:
        """What the replica answers; it is cancelled, and the engine's work with it, where this generator is closed."""
        stream = self._handle.answer.remote(order)
        ended = False
        try:
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
        except GONE as error:
            raise Refusal(503, "the model's server ended; try again", code="engine_error", retry_after_s=5) from error
        finally:
            if not ended:
                stream.cancel()


class RemoteDesk:
    """A `ctrlray.serve.desk.Desk` that is a deployment, shared by several ingress replicas."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def admit(self, asked: Asked) -> Wait | None:
        """Take a request in, or say why not."""
        try:
            found = await self._handle.admit.remote(asked)
        except GONE as error:
            raise Refusal(503, "the server's limits are not there; try again", code="desk_error", retry_after_s=5) from error
        return None if found is None else Wait(*found)

    async def settle(self, outcome: Outcome) -> None:
        """A request that was admitted has ended."""
        await self._told(self._handle.settle.remote(outcome))

    async def refused(self, key: str, status: int) -> None:
        """A request was refused before it reached an engine."""
        await self._told(self._handle.refused.remote(key, status))

    async def metrics(self) -> bytes:
        """Prometheus text."""
        try:
            return bytes(await self._handle.metrics.remote())
        except GONE as error:
            raise Refusal(503, "the server's counts are not there; try again", code="desk_error", retry_after_s=5) from error

    async def _told(self, call: Any) -> None:
        try:
            await call
        except GONE as error:  # a new desk knows nothing of it anyway
            _LOG.warning("the desk was not told of a request: %r", error)
