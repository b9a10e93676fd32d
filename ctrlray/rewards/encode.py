"""From a conversation and an answer to what a sequence classifier reads: the same token ids in training and in scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctrlray.control import neutralise, special_strings
from ctrlray.errors import ConfigError
from ctrlray.hh import write_prompt
from ctrlray.schema import Message


class RewardEncoder:
    """Renders by the tokenizer's chat template; without one as the pair (conversation, answer).

    Special tokens inside texts are neutralised. At most `max_tokens`, and never more than the tokenizer says its model
    takes: the oldest tokens are cut.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, *, hh: bool = False) -> None:
        """`hh`: as one text, written as Anthropic HH's dialogues are, whatever template the tokenizer has."""
        self._hh = hh
        self.max_tokens = min(max_tokens, int(tokenizer.model_max_length))
        self._tokenizer = tokenizer
        self._specials = special_strings(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"the tokenizer of {tokenizer.name_or_path} has no pad and no end-of-sequence token; set one")
        self.pad_id = int(tokenizer.pad_token_id)

    def __call__(self, conversation: Sequence[Message], response: str) -> list[int]:
        """Token ids. Raises jinja2.TemplateError where the chat template refuses the conversation's roles."""
        clean = [Message(role=m["role"], content=neutralise(m["content"], self._specials)) for m in conversation]
        answer = neutralise(response, self._specials)
        if self._hh:
            self._tokenizer.truncation_side = "left"
            text = f"{write_prompt(clean)} {answer}"
            return [int(i) for i in self._tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]]
        if self._tokenizer.chat_template:
            turns = [*clean, Message(role="assistant", content=answer)]
            ids = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            return [int(i) for i in ids[-self.max_tokens :]]
        prompt = "\n\n".join(m["content"] for m in clean)
        parted = self._special(pair=True) > self._special(pair=False)  # by a token of the tokenizer's own
        return self._as_pair(prompt if parted else f"{prompt}\n\n", answer)

    def _special(self, *, pair: bool) -> int:
        return int(self._tokenizer.num_special_tokens_to_add(pair=pair))

    def _as_pair(self, prompt: str, answer: str) -> list[int]:
        """The tokenizer's own special tokens stay: an encoder's score is read from its first one."""
        self._tokenizer.truncation_side = "left"
        room = self.max_tokens - self._special(pair=True)
        alone = len(self._tokenizer(answer, add_special_tokens=False)["input_ids"])
        # `only_first` cuts nothing at all where the answer by itself is too long
        cut = "only_first" if alone < room else "longest_first"
        return [int(i) for i in self._tokenizer(prompt, answer, truncation=cut, max_length=self.max_tokens)["input_ids"]]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [N, S], padded on the right; a mask's 1 is a token."""
        return pad(rows, self.pad_id)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [N, S], padded on the right; a mask's 1 is a token."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[pad_id] * (width - len(r))] for r in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], dtype=torch.long)
    return ids, mask
