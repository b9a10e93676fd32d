"""Rewards from sequence-classification models: a local folder or a hub name, one attribute per logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ctrlray import config, models
from ctrlray.errors import ConfigError
from ctrlray.rewards.base import Floats
from ctrlray.rewards.precise import widen_head
from ctrlray.schema import Message

UNITS = "ctrlray_units"
"""Key of the model's config: {"mean": [...], "std": [...]} by logit; a rating is mean + std x logit. Fine-tuning writes it."""


class HFScorer:
    """Scores conversation plus answer with AutoModelForSequenceClassification, in length-sorted batches."""

    def __init__(self, reward: config.HFReward, setting: str = "rewards.model") -> None:
        """Raises ConfigError when the model cannot be used, as what `setting` says."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from ctrlray.rewards.encode import RewardEncoder

        folder = models.resolve(
            config.Model(name=reward.model, revision=reward.revision, trust_remote_code=reward.trust_remote_code),
            setting,
        )
        self.attributes = reward.attributes
        self._batch_size = reward.batch_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=reward.trust_remote_code)
        dtype = models.pick_dtype("auto", gpu=self._device == "cuda")
        self._model: Any = (
            AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=reward.trust_remote_code, use_safetensors=True
            )
            .to(self._device)
            .eval()
        )
        widen_head(self._model)
        if self._model.config.num_labels != len(self.attributes):
            raise ConfigError(
                f"reward {reward.model!r} has {self._model.config.num_labels} outputs, the job file names {list(self.attributes)}"
            )
        self.encode = RewardEncoder(tokenizer, reward.max_tokens, hh=reward.format == "hh")
        self._model.config.pad_token_id = self.encode.pad_id
        units = getattr(self._model.config, UNITS, {"mean": 0.0, "std": 1.0})
        self._mean, self._std = np.asarray(units["mean"], np.float32), np.asarray(units["std"], np.float32)

    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> dict[str, Floats]:
        """float32 [len(responses)] by attribute: logits, in rating units where the model was fine-tuned on ratings."""
        import torch

        encoded = [self.encode(c, r) for c, r in zip(conversations, responses, strict=True)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        logits = np.zeros((len(encoded), len(self.attributes)), np.float32)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            ids, mask = self.encode.pad([encoded[i] for i in rows])
            with torch.no_grad():
                out = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits
            logits[rows] = out.float().cpu().numpy()
        scores = logits * self._std + self._mean
        return {a: scores[:, i] for i, a in enumerate(self.attributes)}
