"""Which process each trial kills and when: a pure function of the trial's number."""

from __future__ import annotations

import random
from typing import NamedTuple

from ctrlray.pipeline import STAGES

DRIVER, ENGINE, CHILD, REWARD, WORKER, RAYLET = "driver", "engine", "child", "reward actor", "train worker", "raylet"
TRIALS = 50
LIKELIHOOD, PPO = "exmate", "ppo"
"""The two jobs, by the objective that they train: a trial needs only one of them."""


class Where(NamedTuple):
    """A place in the pipeline where a victim is at work, and the stages that run around it."""

    method: str
    first: str
    """Stages before it are taken, finished, from the undisturbed run."""
    stage: str
    last: str
    """Stages behind it read only tables that are compared, so most trials do without them."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that run."""
        return STAGES[STAGES.index(self.first) : STAGES.index(self.last) + 1]


_WHOLE = Where(LIKELIHOOD, "prompts", "generate", "evaluate")
_GENERATE = Where(LIKELIHOOD, "prompts", "generate", "distill")
_SCORE = (Where(LIKELIHOOD, "prompts", "score", "distill"), Where(LIKELIHOOD, "score", "score", "distill"))
"""Behind generation, and alone."""
_TRAIN = (Where(LIKELIHOOD, "train", "train", "train"), Where(PPO, "train", "train", "train"))
_EVALUATE = Where(LIKELIHOOD, "evaluate", "evaluate", "evaluate")
KINDS: dict[str, tuple[str, tuple[Where, ...]]] = {
    "driver while generating": (DRIVER, (_WHOLE,)),
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

    def earlier(self, times: int) -> Trial:
        """The same kill at an earlier moment, after that many runs that ended before their victim was at work."""
        return self._replace(share=self.share / (times + 1), delay_s=0.0) if times else self


def plan(number: int) -> Trial:
    """Kinds take turns, and so do the places of a kind; the moment is drawn."""
    kinds = list(KINDS)
    turn, index = divmod(number, len(kinds))
    kind = kinds[index]
    victim, places = KINDS[kind]
    rng = random.Random(f"chaos:{number}")
    where = places[turn % len(places)]
    # an evaluation's last method is the trained one, whose weights an engine in another's place must get
    most = 0.99 if where.stage == "evaluate" else 0.6
    return Trial(number, kind, victim, where, rng.uniform(0, most), rng.uniform(0, 0.2))
