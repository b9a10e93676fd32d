"""The run's rewards as Serve deployments, and what the ingress asks of them: achieved levels."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctrlray import config
from ctrlray.distill import Levels as LevelScale
from ctrlray.rewards.base import Floats
from ctrlray.rewards.pool import RewardHost
from ctrlray.rewards.rows import weighted
from ctrlray.schema import Message
from ctrlray.serve.handles import GONE
from ctrlray.serve.refusal import Refusal


class RewardServer:
    """One replica of one reward."""

    def __init__(self, reward: config.Reward) -> None:
        self._host = RewardHost(reward)
        self._host.ready()
        self._one_at_a_time = asyncio.Lock()

    async def score(self, chats: Sequence[Sequence[Message]], texts: Sequence[str]) -> tuple[dict[str, Floats], list[str]]:
        """Scores by output, NaN where there is none, and one error per answer."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._host.score, chats, texts)


class RewardJudge:
    """A `ctrlray.serve.served.Judge`: asks every reward, and turns scores into level units by the run's scales."""

    def __init__(
        self, handles: Sequence[Any], control: config.Control, scales: Mapping[str, LevelScale], timeout_s: float
    ) -> None:
        self._handles = list(handles)
        self._control = control
        self._scales = scales
        self._timeout_s = timeout_s

    async def units(self, turns: Sequence[Message], texts: Sequence[str]) -> list[list[float]]:
        """Achieved levels of each text, in the dial's order; NaN where a reward failed."""
        chats = [list(turns)] * len(texts)
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.gather(*(h.score.remote(chats, list(texts)) for h in self._handles))
        except (TimeoutError, *GONE) as error:
            raise Refusal(503, "a reward is not there; try again", code="reward_error", retry_after_s=5) from error
        columns = {name: values for scores, _ in found for name, values in scores.items()}
        return self._in_units(columns, len(texts))

    def _in_units(self, columns: Mapping[str, Floats], size: int) -> list[list[float]]:
        units = np.full((size, len(self._control.attributes)), np.nan)
        for i, attribute in enumerate(self._control.attributes):
            scores = weighted(columns, attribute.sources)
            there = np.isfinite(scores)
            if there.any():
                units[there, i] = self._scales[attribute.name].units(scores[there])
        return [[float(u) for u in row] for row in units]
