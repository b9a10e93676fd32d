"""What stands behind the ingress: models with their engines, and the run's rewards."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ctrlray.schema import Message
from ctrlray.serve.dial import Dial
from ctrlray.serve.prompts import Prompts
from ctrlray.serve.translate import Json


class Engine(Protocol):
    """Where a model's answers come from."""

    def answer(self, order: Json) -> AsyncGenerator[list[str], None]:
        """JSON documents of vLLM's completion API, in batches: chunks when the order says `stream`, else one answer.

        Raises a Refusal when the engine is not there or ends.
        """
        ...


class Judge(Protocol):
    """The run's rewards."""

    async def units(self, turns: Sequence[Message], texts: Sequence[str]) -> list[list[float]]:
        """Achieved levels in continuous units of each text, in the dial's order; NaN where a reward failed.

        Raises a Refusal when a reward is not there.
        """
        ...


@dataclass(frozen=True)
class Served:
    """One model."""

    name: str
    dial: Dial
    prompts: Prompts
    engine: Engine
    seeds: bool
    """Whether its engine survives requests with a seed."""
    method: str
    """How it was made: an objective's name, or `start`."""


def achieved(dial: Dial, units: Sequence[float]) -> dict[str, float | None]:
    """Achieved levels by attribute; None for one without a score."""
    return {r.name: round(u, 2) if math.isfinite(u) else None for r, u in zip(dial.ranges, units, strict=True)}
