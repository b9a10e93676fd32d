"""Scores row by row, whatever a reward does: a row without scores has a reason, and the others keep theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlray.errors import ClusterError, ConfigError
from ctrlray.isolate import DIED
from ctrlray.rewards.base import Floats, Scorer
from ctrlray.schema import Message


def score_rows(scorer: Scorer, chats: Sequence[Sequence[Message]], texts: Sequence[str]) -> tuple[dict[str, Floats], list[str]]:
    """Scores by output and one error per row (empty when fine). A batch that raises is tried row by row."""
    columns = {name: np.full(len(texts), np.nan, np.float32) for name in scorer.attributes}
    errors = [""] * len(texts)
    try:
        _fill(columns, scorer(chats, texts), slice(None), len(texts))
    except (ConfigError, ClusterError):  # no row's fault: a wrong token, a server that is not there
        raise
    except Exception as whole:
        for i in range(len(texts)):
            try:
                _fill(columns, scorer([chats[i]], [texts[i]]), slice(i, i + 1), 1)
            except (ConfigError, ClusterError):
                raise
            except Exception as error:
                errors[i] = f"{type(error).__name__}: {error or whole}"
    for name, values in columns.items():
        for i in np.flatnonzero(~np.isfinite(values)):
            errors[i] = errors[i] or f"not_finite: {name} is {values[i]}"
    return columns, errors


def _fill(columns: dict[str, Floats], given: Mapping[str, Any], rows: slice, size: int) -> None:
    for name, column in columns.items():
        values = np.asarray(given[name], np.float32)
        if values.shape != (size,):
            raise ValueError(f"wrong_length: reward output {name!r} has shape {values.shape}, expected ({size},)")
        column[rows] = values


def weighted(columns: Mapping[str, Floats], sources: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """An attribute's scores: the outputs that feed it, added up by weight."""
    parts = [weight * columns[name].astype(np.float64) for name, weight in sources.items()]
    return np.asarray(np.sum(parts, axis=0))


def died(words: str) -> str:
    """The error of a row that was alone when the reward's process ended, twice, with the last words of that."""
    return f"{DIED}: alone with it the reward's process ended: {words}"


def by_length(chats: Sequence[Sequence[Message]], texts: Sequence[str]) -> list[int]:
    """Row numbers in the order of lengths: neighbours in length share a batch and so waste little padding."""
    return sorted(range(len(texts)), key=lambda i: sum(len(m["content"]) for m in chats[i]) + len(texts[i]))


def yield_to_engines() -> None:
    """On CPU a reward actor takes what the engine beside it leaves: two busy thread pools halve each other and worse."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.nice(10)
