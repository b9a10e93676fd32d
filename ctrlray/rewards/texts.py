"""Rewards that need no model: functions of the conversation's and the answer's words.

In a job file: `{type: function, target: "ctrlray.rewards.texts:brevity", attributes: [brevity]}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ctrlray.schema import Message

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
STEM_LETTERS = 5
"""Words that agree in so many first letters count as one: `garden`, `gardens` and `gardening`."""
SHORTEST_CONTENT_WORD = 4
_FUNCTION_WORDS = """
    about above after again also because been before being between both could does doing down during each from have having
    here into itself just more most must much only other over please same shall should some such than that their them then
    there these they this those through under until very want were what when where which while whom will with would your
"""


def brevity(prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[float]:
    """Minus the natural logarithm of one plus the answer's words: halving an answer counts the same at any length."""
    return [-math.log1p(len(_WORD.findall(r))) for r in responses]


def coverage(prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[float]:
    """Share of the last question's content words that the answer takes up, 0 to 1; 0 when the question has none."""
    return [_share(_stems(p[-1]["content"]), _stems(r)) for p, r in zip(prompts, responses, strict=True)]


def _stems(text: str) -> set[str]:
    ignored = frozenset(_FUNCTION_WORDS.split())
    words = (w.lower() for w in _WORD.findall(text))
    return {w[:STEM_LETTERS] for w in words if len(w) >= SHORTEST_CONTENT_WORD and w not in ignored}


def _share(asked: set[str], answered: set[str]) -> float:
    return len(asked & answered) / len(asked) if asked else 0.0
