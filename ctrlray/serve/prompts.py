"""From a request's messages or text to the token ids that the engine gets, by the one renderer of `ctrlray.control`.

Special tokens in text are neutralised. Beyond that, every prompt is held against what the template alone would place: another
special id, or a control token anywhere but in the code at the end, is refused before any engine sees it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from ctrlray.control import Levels, Renderer
from ctrlray.schema import Message
from ctrlray.serve.api import ChatMessage
from ctrlray.serve.dial import Dial
from ctrlray.serve.refusal import Refusal

_INLINE_CHARS = 20_000
"""Longer texts are tokenized beside the event loop, which would stand still for more than some milliseconds."""


def turns_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """A request's messages as templates and rewards take them: role and text, and nothing else."""
    return [Message(role="system" if m.role == "developer" else m.role, content=m.text) for m in messages]


class Prompts:
    """The prompts of one served model. `coded`: it knows control codes, so each chat ends with one."""

    def __init__(self, tokenizer: Any, dial: Dial, coded: bool, max_context: int) -> None:
        self.coded = coded
        self.max_context = max_context
        self._renderer = Renderer(tokenizer, dial.space, None)
        self._own = Renderer(copy.deepcopy(tokenizer), dial.space, None)  # a tokenizer serves one thread at a time
        self._worker = ThreadPoolExecutor(1, "prompts")
        self._special_ids = frozenset(tokenizer.convert_tokens_to_ids(self._renderer.specials))
        self._begin = [int(i) for i in tokenizer("")["input_ids"]]
        self._longest = max(len(t) for t in tokenizer.get_vocab())
        self._placed = lru_cache(4096)(self._place)

    async def chat(self, turns: Sequence[Message], levels: Levels) -> list[int]:
        """Token ids of a conversation up to and including the code. Raises a Refusal for what the model cannot be asked."""
        chars = self._check_length(m["content"] for m in turns)
        if chars <= _INLINE_CHARS:
            return self._chat(self._renderer, turns, levels)
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._chat, self._own, turns, levels)

    async def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, each with the tokens that the model's texts begin with."""
        chars = self._check_length(texts)
        if chars <= _INLINE_CHARS:
            return self._plain(self._renderer, texts)
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._plain, self._own, texts)

    def token(self, token_id: int) -> str:
        """The text of one token."""
        return str(self._renderer.tokenizer.decode([token_id]))

    def _chat(self, renderer: Renderer, turns: Sequence[Message], levels: Levels) -> list[int]:
        try:
            ids = renderer.render(turns, levels if self.coded else None)
        except TemplateError as error:
            raise Refusal(400, f"the model's chat template does not take this conversation: {error}", "messages") from None
        self._check_specials(ids, self._placed(tuple(m["role"] for m in turns), levels), "messages")
        return self._fitting(ids)

    def _plain(self, renderer: Renderer, texts: Sequence[str]) -> list[list[int]]:
        found = []
        for text in texts:
            ids = renderer.text_ids(text)
            self._check_specials(ids, (), "prompt")
            if not (ids := self._begin + ids):
                raise Refusal(400, "prompt is empty; give some text", "prompt")
            found.append(self._fitting(ids))
        return found

    def _place(self, roles: tuple[str, ...], levels: Levels) -> tuple[int, ...]:
        """Special ids that the template places for turns of these roles."""
        ids = self._renderer.render([Message(role=r, content="x") for r in roles], levels if self.coded else None)
        return self._specials_in(ids)

    def _specials_in(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i in self._special_ids)

    def _check_specials(self, ids: Sequence[int], placed: tuple[int, ...], field: str) -> None:
        if self._specials_in(ids) != placed:
            raise Refusal(400, f"{field} holds text that the model's tokenizer reads as special tokens; remove it", field)

    def _check_length(self, texts: Any) -> int:
        """Characters in all; refuses early what no tokenizer could fit into the context."""
        chars = sum(map(len, texts))
        if chars > self.max_context * self._longest:
            raise _too_long(f"{chars} characters", self.max_context)
        return chars

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) >= self.max_context:
            raise _too_long(f"{len(ids)} tokens", self.max_context)
        return ids


def _too_long(what: str, context: int) -> Refusal:
    message = f"the prompt has {what}; the model takes {context} tokens with its answer"
    return Refusal(400, message, code="context_length_exceeded")
