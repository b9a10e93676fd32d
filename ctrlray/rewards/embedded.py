"""The embedded reward: linear heads on hidden states of a frozen chat model. Training lives in `train`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from ctrlray.errors import ConfigError
from ctrlray.rewards.base import Floats
from ctrlray.rewards.heads import Heads
from ctrlray.schema import Message

PACKAGED = "smollm2-hh.safetensors"


def packaged_heads() -> Path:
    """The heads that ship with ctrlray: helpfulness and harmlessness on the embedded SmolLM2."""
    return Path(str(resources.files("ctrlray") / "assets" / "heads" / PACKAGED))


class EmbeddedReward:
    """A Scorer; see `ctrlray.rewards.base`."""

    def __init__(
        self, model_folder: str | Path, heads_path: str | Path | None = None, dtype: str = "auto", max_tokens: int = 1024
    ) -> None:
        """Load the heads (the packaged ones by default) and the blocks they read.

        `dtype`: float32, bfloat16, or auto, which takes bfloat16 where it is native. Raises ConfigError when the heads
        were made for another model.
        """
        from ctrlray import models

        self.heads = Heads.load(heads_path or packaged_heads())
        found = models.fingerprint(Path(model_folder))
        if found != self.heads.fingerprint:
            raise ConfigError(
                f"reward heads {heads_path or PACKAGED} were made for the model with fingerprint {self.heads.fingerprint}, "
                f"but {model_folder} has {found}; use that model, or make heads for this one with `ctrlray reward train`"
            )
        # Only now, so that a wrong file is refused before torch loads.
        from ctrlray.rewards.features import FeatureExtractor

        self.features = FeatureExtractor(
            model_folder, layers=self.heads.layers, positions=self.heads.positions, dtype=dtype, max_tokens=max_tokens
        )

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the heads."""
        return self.heads.attributes

    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> dict[str, Floats]:
        """Scores in log-odds of preference, float32 [len(responses)] per attribute."""
        if not len(responses):
            return {a: np.zeros(0, np.float32) for a in self.attributes}
        scores = self.heads.score(self.features(conversations, responses))
        return {a: np.asarray(scores[:, i], np.float32) for i, a in enumerate(self.attributes)}
