"""Persistent pools of named reward actors, one pool a reward: started once, asked for scores step after step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctrlray import config
from ctrlray.actors import ActorPool, Words
from ctrlray.errors import CtrlRayError
from ctrlray.rewards.base import Floats, Scorer
from ctrlray.rewards.registry import build
from ctrlray.rewards.rows import by_length, died, score_rows, yield_to_engines
from ctrlray.schema import Message

_WORDS = Words("reward actor", "a", "answers", "score.pool.max_restarts", "score.batch_size")


class RewardHost:
    """One reward in a process of its own."""

    def __init__(self, reward: config.Reward, place: str = "rewards") -> None:
        yield_to_engines()
        self._refusal: CtrlRayError | None = None
        try:
            self._scorer: Scorer = build(reward, place)
        except CtrlRayError as error:  # out of a constructor it would reach nobody as what it is
            self._refusal = error

    def ready(self) -> tuple[str, ...]:
        """The names of its outputs, once the reward is up. Raises what kept it from being made."""
        if self._refusal is not None:
            raise self._refusal
        return tuple(self._scorer.attributes)

    def score(self, chats: Sequence[Sequence[Message]], texts: Sequence[str]) -> tuple[dict[str, Floats], list[str]]:
        """Scores by output, NaN where there is none, and one error per answer."""
        return score_rows(self._scorer, chats, texts)


class RewardPool:
    """`pool.max_size` actors for each reward, `<name>-<reward>-<actor>-<restarts>`; use as a context manager.

    An actor that dies or raises is replaced and its answers are tried again in eighths, until the answer that ends actors
    is alone and left out. `pool.max_restarts` bounds that, for each reward.
    """

    def __init__(
        self,
        rewards: Sequence[config.Reward],
        pool: config.Pool,
        name: str,
        stall_timeout_s: float,
        places: Sequence[str] | None = None,
    ) -> None:
        """`places` are where the job has them, for errors."""
        where = places or ["rewards"] * len(rewards)
        self._pools = [
            ActorPool(RewardHost, (reward, place), pool, f"{name}-{i}", _WORDS, stall_timeout_s)
            for i, (reward, place) in enumerate(zip(rewards, where, strict=True))
        ]
        self._outputs: list[tuple[str, ...]] = []

    def __enter__(self) -> RewardPool:
        """Wait until every reward is up. Raises the ConfigError of one that cannot be made."""
        try:
            self._outputs = [actors.__enter__().greetings[0] for actors in self._pools]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the actors."""
        self.close()

    def close(self) -> None:
        """Stop the actors' processes."""
        for actors in self._pools:
            actors.close()

    def score(
        self, chats: Sequence[Sequence[Message]], texts: Sequence[str], batch_size: int
    ) -> tuple[dict[str, Floats], list[str]]:
        """Scores of `texts[i]` as the next turn of `chats[i]`: float32 [N] by output, and N errors, empty where all is well.

        One reward after the other; an answer that one of them could not score is not given to those behind it, and has NaN.
        """
        columns = {name: np.full(len(texts), np.nan, np.float32) for outputs in self._outputs for name in outputs}
        errors = [""] * len(texts)
        order = by_length(chats, texts)
        for actors in self._pools:
            _score(actors, chats, texts, [i for i in order if not errors[i]], batch_size, columns, errors)
        return columns, errors


def _score(
    actors: ActorPool,
    chats: Sequence[Sequence[Message]],
    texts: Sequence[str],
    rows: Sequence[int],
    batch_size: int,
    columns: Mapping[str, Floats],
    errors: list[str],
) -> None:
    """Have one reward score some rows; fills in its columns and the errors."""

    def submit(actor: Any, batch: list[int]) -> Any:
        chosen = [rows[k] for k in batch]
        return actor.score.remote([list(chats[i]) for i in chosen], [texts[i] for i in chosen])

    def keep(batch: list[int], made: tuple[dict[str, Floats], list[str]]) -> None:
        scores, failures = made
        chosen = [rows[k] for k in batch]
        for name, values in scores.items():
            columns[name][chosen] = values
        for i, failure in zip(chosen, failures, strict=True):
            errors[i] = failure

    for k, words in actors.run(len(rows), batch_size, submit, keep).items():
        errors[rows[k]] = died(words)
