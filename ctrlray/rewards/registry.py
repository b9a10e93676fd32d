"""From a reward in the job file to a Scorer, built in the process that uses it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrlray import config
from ctrlray.errors import ConfigError, DataError
from ctrlray.rewards.base import Floats, Scorer
from ctrlray.schema import Message


def build(reward: config.Reward, place: str = "rewards") -> Scorer:
    """The scorer that `reward` describes. Raises ConfigError when it cannot be made.

    `place` is where the job has it, `rewards.1`, for errors of its model.
    """
    match reward:
        case config.EmbeddedReward():
            from ctrlray import models
            from ctrlray.rewards.embedded import EmbeddedReward

            folder = models.resolve(config.Model(name=reward.model), f"{place}.model")
            return EmbeddedReward(folder, Path(reward.heads) if reward.heads else None)
        case config.TfidfReward():
            from ctrlray.rewards.tfidf import TfidfScorer

            return TfidfScorer(reward.heads)
        case config.HFReward():
            from ctrlray.rewards.hf import HFScorer

            return HFScorer(reward, f"{place}.model")
        case config.FunctionReward():
            return FunctionScorer(reward)
        case config.HTTPReward():
            from ctrlray.rewards.http import HTTPScorer

            return HTTPScorer(reward)
        case config.JudgeReward():
            from ctrlray.rewards.http import JudgeScorer

            return JudgeScorer(reward)


class FunctionScorer:
    """A user's function of conversations and answers."""

    def __init__(self, reward: config.FunctionReward) -> None:
        module, _, name = reward.target.partition(":")
        try:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
        except Exception as error:  # a user's module may raise anything while it is imported
            hint = " Is its folder on PYTHONPATH?" if isinstance(error, ImportError) else ""
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"rewards.function.target={reward.target!r} cannot be imported: {what}.{hint}") from error
        self.attributes = reward.attributes
        self._target = target
        self._name = reward.target

    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> dict[str, Floats]:
        """Call the function; it gives one list of floats, or a dict of lists by attribute."""
        given = self._target([list(c) for c in conversations], list(responses))
        columns = given if isinstance(given, dict) else {self.attributes[0]: given}
        missing = set(self.attributes) - set(columns)
        if missing:
            raise DataError(f"reward {self._name} gave {sorted(columns)}, the job file expects {list(self.attributes)}")
        return {a: np.asarray(columns[a], np.float32) for a in self.attributes}
