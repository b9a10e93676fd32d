r"""Anthropic HH's native preference files: dialogues in, (messages, chosen, rejected) out.

A row is `{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}`; both share all turns but the last answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ctrlray.errors import DataError
from ctrlray.schema import Message, first_human_turn

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """One human preference: `chosen` beat `rejected` as the next turn of `messages`."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    """By how much, in log-odds; None where the labels do not say."""


def judge_half(first_turn: str) -> bool:
    """Whether a dialogue belongs to the half that only held-out judges may learn from.

    Decided by the SHA-256 of its first human turn, so that rows which share an opening fall on one side: the last bit is
    1 for the judge's half, 0 for the reward's. Leading and trailing white space does not count.
    """
    return bool(hashlib.sha256(first_turn.strip().encode("utf-8", "surrogatepass")).digest()[-1] & 1)


def parse_dialogue(text: str) -> list[Message]:
    r"""Split `"\n\nHuman: a\n\nAssistant: b"` into messages; a speaker twice in a row is one message of two paragraphs."""
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise DataError(f"not an HH dialogue, it must begin with 'Human:' or 'Assistant:': {text[:60]!r}")
    messages: list[Message] = []
    for mark, end in zip(marks, [m.start() for m in marks[1:]] + [len(text)], strict=True):
        role, content = _ROLES[mark[1]], text[mark.end() : end].strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}"
        messages.append({"role": role, "content": content})
    return messages


def write_prompt(messages: Sequence[Message]) -> str:
    r"""The dialogue before an answer, which follows after a space: `"\n\nHuman: a\n\nAssistant:"`.

    HH knows no system turns: one is read as the human's.
    """
    speakers = {"assistant": "Assistant"}
    turns = "".join(f"\n\n{speakers.get(m['role'], 'Human')}: {m['content']}" for m in messages)
    return f"{turns}\n\nAssistant:"


def parse_pair(chosen: str, rejected: str) -> Pair:
    """The shared turns and the two last answers of a native row."""
    a, b = parse_dialogue(chosen), parse_dialogue(rejected)
    for name, turns in (("chosen", a), ("rejected", b)):
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise DataError(f"{name} must end with an answer to something: {turns[-1]['content'][:60]!r}")
    if a[:-1] != b[:-1]:
        raise DataError(f"chosen and rejected differ before the last answer: {first_human_turn(a)[:60]!r}")
    return Pair(tuple(a[:-1]), a[-1]["content"], b[-1]["content"])
