"""The run's rewards as Serve deployments, and what the ingress asks of them: achieved levels."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ctrlray import config
from ctrlray.distill import Levels as LevelScale
from ctrlray.rewards.base import Floats
from ctrlray.rewards.pool import RewardHost
from ctrlray.rewards.rows import weighted
from ctrlray.schema import Message
from ctrlray.serve.handles import cancel, own_cancellation
from ctrlray.serve.refusal import Refusal

_LOG = logging.getLogger(__name__)


class RewardServer:
    """One replica of one reward."""

    def __init__(self, reward: config.Reward) -> None:
        self._host = RewardHost(reward)
        self._host.ready()
        self._thread = ThreadPoolExecutor(1)  # one at a time, also after one that nobody waits for any more

    async def score(self, chats: Sequence[Sequence[Message]], texts: Sequence[str]) -> tuple[dict[str, Floats], list[str]]:
        """Scores by output, NaN where there is none, and one error per answer."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._host.score, chats, texts)


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
        chats, calls = [list(turns)] * len(texts), []
        try:
            calls += [h.score.remote(chats, list(texts)) for h in self._handles]
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.gather(*calls)
        except (Exception, asyncio.CancelledError) as error:
            for call in calls:  # nobody waits for the others any more
                cancel(call)
            if isinstance(error, asyncio.CancelledError) and own_cancellation():
                raise
            _LOG.warning("a reward did not answer: %r", error)
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
