"""Hidden states of a frozen chat model as features of (conversation, answer). No heads and no training here.

Shape key: N answers, P prompts and B answers of one pass, T tokens, H hidden size, F = len(layers) * len(positions) * H.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctrlray.errors import ConfigError
from ctrlray.schema import Message

POSITIONS = ("last", "end", "mean")
"""Where in an answer a feature is read: its last text token; the end-of-turn token after it; averaged over its text tokens."""
Floats = npt.NDArray[np.float32]
Groups = Mapping[tuple[int, ...], Sequence[tuple[int, list[int]]]]
_JOINER = "\u200d"


class FeatureExtractor:
    """Runs the first `max(layers)` blocks of a model over rendered conversations.

    Layer k is the residual stream after block k, counted from 1 and without the final norm, so that a feature does not
    depend on how many blocks are run.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Sequence[int],
        positions: Sequence[str] = ("last",),
        dtype: str = "auto",
        max_tokens: int = 1024,
        batch_tokens: int = 2048,
    ) -> None:
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        from ctrlray.models import pick_dtype

        self.layers, self.positions = tuple(layers), tuple(positions)
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"the model in {folder} has no chat template; a reward on it needs one")
        config = AutoConfig.from_pretrained(folder)
        # A folder made from a quantised file may still name its origin; the weights here are plain.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = getattr(torch, pick_dtype(dtype, gpu=self.device == "cuda"))
        self.model: Any = AutoModel.from_pretrained(folder, config=config, dtype=chosen)
        blocks = getattr(self.model, "layers", None)
        if blocks is None:
            raise ConfigError(f"cannot find the blocks of a {type(self.model).__name__}; embedded rewards need `.layers`")
        if not self.positions or not set(self.positions) <= set(POSITIONS):
            raise ConfigError(f"positions={list(positions)} must be some of {list(POSITIONS)}")
        if not self.layers or not 1 <= min(self.layers) <= max(self.layers) <= len(blocks):
            raise ConfigError(f"layers={list(layers)} must lie in 1..{len(blocks)} for the model in {folder}")
        self.model.layers = blocks[: max(self.layers)]
        self.model.to(self.device).eval()
        self._seen: dict[int, torch.Tensor] = {}
        for layer in set(self.layers):
            self.model.layers[layer - 1].register_forward_hook(self._keep(layer))
        self._specials = _special_pattern(self.tokenizer)

    @property
    def num_features(self) -> int:
        """F, the length of one answer's feature vector: layers outermost, then positions."""
        return len(self.layers) * len(self.positions) * int(self.model.config.hidden_size)

    def encode(self, conversation: Sequence[Message], response: str) -> tuple[list[int], int]:
        """Token ids of the rendered conversation and answer, and how many of them are the answer's text.

        The prompt is the model's own chat template with the generation header; the answer's tokens and the end-of-turn
        token follow, as in sampling. What looks like a special token inside a message is broken up, so no text can end
        a turn or open another. Too long input loses its beginning, never the answer's end.
        """
        messages = [{"role": m["role"], "content": self._neutral(m["content"])} for m in conversation]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer: list[int] = self.tokenizer(self._neutral(response.strip()) or " ", add_special_tokens=False)["input_ids"]
        answer = answer[-(self.max_tokens - 2) :]
        room = self.max_tokens - 1 - len(answer)
        return [*prompt[-room:], *answer, self.tokenizer.eos_token_id], len(answer)

    def num_answer_tokens(self, response: str) -> int:
        """Length of an answer in tokens, without the end-of-turn token."""
        return len(self.tokenizer(self._neutral(response.strip()) or " ", add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> Floats:
        """Features, float32 [N, F], in the order of the input. Answers to one conversation share its prompt's pass."""
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for i, (conversation, response) in enumerate(zip(conversations, responses, strict=True)):
            ids, count = self.encode(conversation, response)
            groups.setdefault(tuple(ids[: -count - 1]), []).append((i, ids[-count - 1 :]))
        out = np.empty((len(responses), self.num_features), np.float32)
        for prompts in self._batches(groups):
            rows = [(k, i, answer) for k, prompt in enumerate(prompts) for i, answer in groups[prompt]]
            out[[i for _, i, _ in rows]] = self._forward(prompts, [k for k, _, _ in rows], [a for _, _, a in rows])
        return out

    def _neutral(self, text: str) -> str:
        while self._specials.search(text):
            text = self._specials.sub(lambda m: m[0][0] + _JOINER + m[0][1:], text)
        return text

    def _keep(self, layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _batches(self, groups: Groups) -> Iterator[list[tuple[int, ...]]]:
        """Prompts of passes with at most `batch_tokens` padded tokens; neighbours in length share a pass."""
        batch: list[tuple[int, ...]] = []
        rows = longest = 0
        for prompt in sorted(groups, key=len):
            answers = [len(a) for _, a in groups[prompt]]
            rows, longest = rows + len(answers), max(longest, *answers)
            # The prompt's keys are copied to each of its answers, hence rows times the whole length.
            if batch and rows * (len(prompt) + longest) > self.batch_tokens:
                yield batch
                batch, rows, longest = [], len(answers), max(answers)
            batch.append(prompt)
        if batch:
            yield batch

    def _forward(self, prompts: Sequence[tuple[int, ...]], prompt_of: Sequence[int], answers: Sequence[list[int]]) -> Floats:
        """Features [B, F] of `answers` (with their end-of-turn token), answer b after prompt `prompt_of[b]`."""
        ids_PT, mask_PT = self._pad(prompts)
        cache = self.model(input_ids=ids_PT, attention_mask=mask_PT, use_cache=True).past_key_values
        pick_B = torch.tensor(list(prompt_of), device=self.device)
        cache.batch_select_indices(pick_B)
        ids_BT, mask_BT = self._pad(answers)
        start_B, lengths = mask_PT.sum(-1)[pick_B], mask_BT.sum(-1)
        at_T = torch.arange(ids_BT.shape[1], device=self.device)
        self.model(
            input_ids=ids_BT,
            attention_mask=torch.cat([mask_PT[pick_B], mask_BT], dim=1),
            position_ids=start_B[:, None] + at_T,  # a padded prompt leaves no gap before its answers
            past_key_values=cache,
            use_cache=True,
        )
        text_BT = at_T < lengths[:, None] - 1
        row_B = torch.arange(len(answers), device=self.device)
        parts = []
        for layer in self.layers:
            hidden_BTH = self._seen[layer].float()
            for position in self.positions:
                if position == "mean":
                    parts.append(torch.einsum("bt,bth->bh", text_BT / text_BT.sum(-1, keepdim=True), hidden_BTH))
                else:
                    parts.append(hidden_BTH[row_B, lengths - (1 if position == "end" else 2)])
        self._seen.clear()
        features: Floats = torch.cat(parts, dim=-1).cpu().numpy()
        return features

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask [B, T], padded on the right; a mask's 1 is a token."""
        width = max(map(len, rows))
        ids = [[*r, *[int(self.tokenizer.eos_token_id)] * (width - len(r))] for r in rows]
        mask = [[1] * len(r) + [0] * (width - len(r)) for r in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Every text that the tokenizer would turn into one of its added tokens, longest first."""
    texts = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    # A one-character added token cannot be split and carries no structure.
    ordered = sorted((t for t in texts if len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")
