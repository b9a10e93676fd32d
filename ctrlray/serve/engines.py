"""The ingress's side of a model's replicas: calls that end with a Refusal instead of an error of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from ctrlray.serve.refusal import Refusal
from ctrlray.serve.translate import Json


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
            yield await asyncio.wait_for(anext(stream), self._timeout_s)
            async for batch in stream:
                yield batch
            ended = True
        except StopAsyncIteration:
            ended = True
        except TimeoutError:
            message = f"no answer within {self._timeout_s:g} s; come again later"
            raise Refusal(503, message, code="engine_timeout", retry_after_s=10) from None
        except BackPressureError as error:
            raise Refusal(429, "the model's queue is full; come again later", code="queue_full", retry_after_s=5) from error
        except (RayError, RayServeException) as error:
            raise Refusal(503, "the model's server ended; try again", code="engine_error", retry_after_s=5) from error
        finally:
            if not ended:
                stream.cancel()
