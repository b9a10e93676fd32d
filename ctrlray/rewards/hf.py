"""Rewards from sequence-classification models: a local folder or a hub name, one attribute per logit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ctrlray import config, models
from ctrlray.control import neutralise, special_strings
from ctrlray.errors import ConfigError
from ctrlray.rewards.base import Floats
from ctrlray.schema import Message


class HFScorer:
    """Scores conversation plus answer with AutoModelForSequenceClassification, in length-sorted batches."""

    def __init__(self, reward: config.HFReward) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = models.resolve(
            config.Model(name=reward.model, revision=reward.revision, trust_remote_code=reward.trust_remote_code),
            "rewards.model",
        )
        self.attributes = reward.attributes
        self._batch_size, self._max_tokens = reward.batch_size, reward.max_tokens
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=reward.trust_remote_code)
        self._specials = special_strings(self._tokenizer)
        dtype = models.pick_dtype("auto", gpu=self._device == "cuda")
        self._model = (
            AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=reward.trust_remote_code, use_safetensors=True
            )
            .to(self._device)
            .eval()
        )
        if self._model.config.num_labels != len(self.attributes):
            raise ConfigError(
                f"reward {reward.model!r} has {self._model.config.num_labels} outputs, the job file names {list(self.attributes)}"
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id

    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> dict[str, Floats]:
        """Logits as float32 arrays of shape [len(responses)], by attribute."""
        import torch

        encoded = [self._encode(c, r) for c, r in zip(conversations, responses, strict=True)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        logits = np.zeros((len(encoded), len(self.attributes)), np.float32)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt", padding_side="right")
            with torch.no_grad():
                out = self._model(**{k: v.to(self._device) for k, v in batch.items()}).logits
            logits[rows] = out.float().cpu().numpy()
        return {a: logits[:, i] for i, a in enumerate(self.attributes)}

    def _encode(self, conversation: Sequence[Message], response: str) -> list[int]:
        """Token ids, by the chat template where the model has one; the oldest tokens are cut when too long."""
        clean = [Message(role=m["role"], content=neutralise(m["content"], self._specials)) for m in conversation]
        answer = neutralise(response, self._specials)
        if self._tokenizer.chat_template:
            turns = [*clean, Message(role="assistant", content=answer)]
            ids = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        else:
            ids = self._tokenizer("\n\n".join(m["content"] for m in clean), answer)["input_ids"]
        return [int(i) for i in ids[-self._max_tokens :]]
