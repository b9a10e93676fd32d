"""The one interface of all rewards. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ctrlray.schema import Message

Floats = npt.NDArray[np.float32]


class Scorer(Protocol):
    """Scores answers; built inside the process that will use it."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the scores, in order."""
        ...

    def __call__(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> dict[str, Floats]:
        """Score `responses[i]` as the next turn of `conversations[i]`; each array is float32 of shape [len(responses)].

        Higher is more of the attribute. Scores have no fixed unit: only their order and differences count.
        """
        ...


@runtime_checkable
class RowScorer(Scorer, Protocol):
    """A scorer that knows by itself which rows failed, and so is not asked again for the others."""

    def rows(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]
    ) -> tuple[dict[str, Floats], list[str]]:
        """Scores by output, NaN where there is none, and one error per row, `kind: words`, empty where all is well."""
        ...
