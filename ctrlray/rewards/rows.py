"""Scores row by row, whatever a reward does: a row without scores has a reason, and the others keep theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ctrlray.errors import ClusterError, ConfigError
from ctrlray.isolate import DIED
from ctrlray.rewards.base import Floats, RowScorer, Scorer
from ctrlray.schema import Message

T = TypeVar("T")


def score_rows(scorer: Scorer, chats: Sequence[Sequence[Message]], texts: Sequence[str]) -> tuple[dict[str, Floats], list[str]]:
    """Scores by output and one error per row (empty when fine). A batch that raises is tried row by row."""
    columns, errors = scorer.rows(chats, texts) if isinstance(scorer, RowScorer) else _tried(scorer, chats, texts)
    for name, values in columns.items():
        for i in np.flatnonzero(~np.isfinite(values)):
            errors[i] = errors[i] or f"not_finite: {name} is {values[i]}"
    return columns, errors


def _tried(scorer: Scorer, chats: Sequence[Sequence[Message]], texts: Sequence[str]) -> tuple[dict[str, Floats], list[str]]:
    columns = {name: np.full(len(texts), np.nan, np.float32) for name in scorer.attributes}

    def fill(rows: slice) -> None:
        _fill(columns, scorer(chats[rows], texts[rows]), rows, len(texts[rows]))

    _, failed = caught(partial(fill, slice(0, len(texts))))
    each = [slice(i, i + 1) for i in range(len(texts))] if failed else []
    return columns, [caught(partial(fill, row))[1] for row in each] or [""] * len(texts)


def caught(call: Callable[[], T]) -> tuple[T | None, str]:
    """What a call gives, or the error, `kind: words`, that is its rows' fault."""
    try:
        return call(), ""
    except (ConfigError, ClusterError):  # no row's fault: a wrong token, a server that is not there
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


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
        os.nice(19)
