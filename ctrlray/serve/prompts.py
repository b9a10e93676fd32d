"""From a request's messages or text to the token ids that the engine gets, by the one renderer of `ctrlray.control`.

Special tokens in text are neutralised; text that the tokenizer reads as special all the same is refused: no engine sees it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from ctrlray.control import Levels, Renderer
from ctrlray.errors import DataError
from ctrlray.schema import Message
from ctrlray.serve.api import ChatMessage
from ctrlray.serve.dial import Dial
from ctrlray.serve.refusal import Refusal

T = TypeVar("T")
_INLINE_CHARS, _INLINE_TURNS = 20_000, 64
"""What is longer is rendered beside the event loop, which would stand still for more than some milliseconds."""


def turns_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """A request's messages as templates and rewards take them: role and text, and nothing else."""
    return [Message(role="system" if m.role == "developer" else m.role, content=m.text) for m in messages]


class Prompts:
    """The prompts of one served model. `coded`: it knows control codes, so each chat ends with one."""

    def __init__(self, tokenizer: Any, dial: Dial, coded: bool, max_context: int) -> None:
        self.coded = coded
        self.max_context = max_context
        # a tokenizer serves one thread at a time
        self._inline = _Refusing(Renderer(tokenizer, dial.space, None), coded)
        self._beside = _Refusing(Renderer(copy.deepcopy(tokenizer), dial.space, None), coded)
        self._worker = ThreadPoolExecutor(1, "prompts")
        self._longest = max(len(t) for t in tokenizer.get_vocab())

    async def chat(self, turns: Sequence[Message], levels: Levels) -> list[int]:
        """Token ids of a conversation up to and including the code. Raises a Refusal for what the model cannot be asked."""
        chars = self._check_length(m["content"] for m in turns)
        if chars <= _INLINE_CHARS and len(turns) <= _INLINE_TURNS:
            return self._fitting(self._inline.chat(turns, levels))
        return self._fitting(await self._run(self._beside.chat, turns, levels))

    async def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, each with the tokens that the model's texts begin with."""
        chars = self._check_length(texts)
        found = self._inline.plain(texts) if chars <= _INLINE_CHARS else await self._run(self._beside.plain, texts)
        return [self._fitting(ids) for ids in found]

    def token(self, token_id: int) -> str:
        """The text of one token."""
        return str(self._inline.renderer.tokenizer.decode([token_id]))

    def _run(self, call: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._worker, call, *arguments)

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


class _Refusing:
    """A renderer whose errors are refusals of the request."""

    def __init__(self, renderer: Renderer, coded: bool) -> None:
        self.renderer = renderer
        self._coded = coded
        self._begin = [int(i) for i in renderer.tokenizer("")["input_ids"]]

    def chat(self, turns: Sequence[Message], levels: Levels) -> list[int]:
        """A conversation's ids."""
        try:
            return self.renderer.render(turns, levels if self._coded else None)
        except TemplateError as error:
            raise Refusal(400, f"the model's chat template does not take this conversation: {error}", "messages") from None
        except DataError:
            raise _special("messages") from None

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids."""
        try:
            found = [self._begin + self.renderer.text_ids(text) for text in texts]
        except DataError:
            raise _special("prompt") from None
        if not all(found):
            raise Refusal(400, "prompt is empty; give some text", "prompt")
        return found


def _special(field: str) -> Refusal:
    return Refusal(400, f"{field} holds text that the model's tokenizer reads as special tokens; remove it", field)


def _too_long(what: str, context: int) -> Refusal:
    message = f"the prompt has {what}; the model takes {context} tokens with its answer"
    return Refusal(400, message, code="context_length_exceeded")
