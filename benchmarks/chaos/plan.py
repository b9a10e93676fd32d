"""Which process each trial kills and when: a pure function of the trial's number."""

from __future__ import annotations

import random
from typing import NamedTuple

DRIVER, ENGINE, CHILD, REWARD, WORKER, RAYLET = "driver", "engine", "child", "reward actor", "train worker", "raylet"
LIKELIHOOD, PPO = "exmate", "ppo"
"""The two jobs, by the objective that they train: a trial needs only one of them."""


class Where(NamedTuple):
    """A place in the pipeline where a victim is at work."""

    method: str
    first: str
    """Stages before it are taken, finished, from the undisturbed run."""
    stage: str


_GENERATE = Where(LIKELIHOOD, "prompts", "generate")
_SCORE = (Where(LIKELIHOOD, "prompts", "score"), Where(LIKELIHOOD, "score", "score"))
"""Behind generation, and alone."""
_TRAIN = (Where(LIKELIHOOD, "train", "train"), Where(PPO, "train", "train"))
_EVALUATE = Where(LIKELIHOOD, "evaluate", "evaluate")
KINDS: dict[str, tuple[str, tuple[Where, ...]]] = {
    "driver while generating": (DRIVER, (_GENERATE,)),
    "driver while scoring": (DRIVER, _SCORE),
    "driver while training": (DRIVER, _TRAIN),
    "driver while evaluating": (DRIVER, (_EVALUATE,)),
    "engine": (ENGINE, (_GENERATE, _EVALUATE)),
    "child of an engine": (CHILD, (_GENERATE, _EVALUATE)),
    "reward actor": (REWARD, (*_SCORE, _EVALUATE, _TRAIN[1])),
    "train worker": (WORKER, _TRAIN),
    "rollout engine of PPO": (ENGINE, (_TRAIN[1],)),
    "raylet of a non-head node": (RAYLET, (_GENERATE, _SCORE[1], *_TRAIN, _EVALUATE)),
}


class Trial(NamedTuple):
    """One kill."""

    number: int
    kind: str
    victim: str
    where: Where
    share: float
    """Of the stage's work that is finished at least when it comes."""
    delay_s: float
    """Further seconds until a victim is looked for."""

    @property
    def clustered(self) -> bool:
        """Whether it needs a cluster of several nodes."""
        return self.victim == RAYLET


def plan(number: int) -> Trial:
    """Kinds take turns, and so do the places of a kind; the moment is drawn."""
    kinds = list(KINDS)
    turn, index = divmod(number, len(kinds))
    kind = kinds[index]
    victim, places = KINDS[kind]
    rng = random.Random(f"chaos:{number}")
    return Trial(number, kind, victim, places[turn % len(places)], rng.uniform(0, 0.75), rng.uniform(0, 0.4))
