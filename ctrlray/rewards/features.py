"""Hidden states of a frozen chat model as features of (conversation, answer). No heads and no training here.

Shape key: N answers, B rows of one forward pass, T tokens, H hidden size, F = len(layers) * len(positions) * H.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ctrlray.errors import ConfigError
from ctrlray.schema import Message

Position = Literal["last", "end", "mean"]
"""Where in an answer a feature is read. `last`: the answer's last text token; `end`: the end-of-turn token after it; `mean`: average over the answer's text tokens."""
Floats = npt.NDArray[np.float32]
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
        positions: Sequence[Position] = ("last",),
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
        ids = [*prompt, *answer, self.tokenizer.eos_token_id][-self.max_tokens :]
        return ids, min(len(answer), len(ids) - 1)

    def num_answer_tokens(self, response: str) -> int:
        """Length of an answer in tokens, without the end-of-turn token."""
        return len(self.tokenizer(self._neutral(response.strip()) or " ", add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> Floats:
        """Features, float32 [N, F], in the order of the input."""
        encoded = [self.encode(c, r) for c, r in zip(conversations, responses, strict=True)]
        out = np.empty((len(encoded), self.num_features), np.float32)
        for rows in self._batches([len(ids) for ids, _ in encoded]):
            out[rows] = self._forward([encoded[i] for i in rows])
        return out

    def _neutral(self, text: str) -> str:
        while self._specials.search(text):
            text = self._specials.sub(lambda m: m[0][0] + _JOINER + m[0][1:], text)
        return text

    def _keep(self, layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers of passes with at most `batch_tokens` padded tokens; neighbours in length share a pass."""
        rows: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if rows and lengths[i] * (len(rows) + 1) > self.batch_tokens:
                yield rows
                rows = []
            rows.append(i)
        if rows:
            yield rows

    def _forward(self, encoded: Sequence[tuple[list[int], int]]) -> Floats:
        lengths = torch.tensor([len(ids) for ids, _ in encoded])
        answers = torch.tensor([n for _, n in encoded])
        ids_BT = torch.full((len(encoded), int(lengths.max())), int(self.tokenizer.eos_token_id))
        for row, (ids, _) in enumerate(encoded):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        at_T = torch.arange(ids_BT.shape[1])
        mask_BT = at_T < lengths[:, None]
        text_BT = mask_BT & (at_T < lengths[:, None] - 1) & (at_T >= (lengths - 1 - answers)[:, None])
        self.model(input_ids=ids_BT.to(self.device), attention_mask=mask_BT.long().to(self.device), use_cache=False)
        row_B = torch.arange(len(encoded))
        parts = []
        for layer in self.layers:
            hidden_BTH = self._seen[layer]
            for position in self.positions:
                if position == "mean":
                    weight_BT = (text_BT / text_BT.sum(-1, keepdim=True)).to(self.device, torch.float32)
                    parts.append(torch.einsum("bt,bth->bh", weight_BT, hidden_BTH.float()))
                else:
                    parts.append(hidden_BTH[row_B, lengths - (1 if position == "end" else 2)].float())
        self._seen.clear()
        features: Floats = torch.cat(parts, dim=-1).cpu().numpy()
        return features


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Every text that the tokenizer would turn into one of its added tokens, longest first."""
    texts = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    # A one-character added token cannot be split and carries no structure.
    ordered = sorted((t for t in texts if len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")
