"""Engines that sleep: what `benchmarks.scale` puts in the place of vLLM. All around them is ctrlray's own.

An engine takes as long for a batch as one with a given rate would, and answers with words of a fixed length. So a machine of two
cores runs as many of them as a cluster of GPUs, and what is measured is what lies between them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctrlray import config
from ctrlray.clock import STARTS
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.schema import Message
from ctrlray.tables import Storage

BUSY = "busy"
"""Folder of one file per engine, a line per batch: when it began and its seconds."""
SLOW_S = 0.25


@dataclass(frozen=True)
class Simulation(EngineSpec):
    """Recipe of a simulated engine."""

    tokens_per_s: float = float("inf")
    answer_tokens: int = 24
    answer_bytes: int = 100
    engines: int = 1
    """None answers before so many are up."""
    folder: str = ""
    """Of the stage, on this machine."""

    def build(self) -> Any:
        """The engine that sleeps."""
        return SleepingEngine(self)

    def seconds(self, rows: int) -> float:
        """What a batch takes."""
        return rows * self.answer_tokens / self.tokens_per_s


class SleepingEngine:
    """Sleeps for as long as the answers would take; the first batch is a random part of one, as engines never start in step."""

    weights_version = 0

    def __init__(self, spec: Simulation) -> None:
        self._spec, self._out, self._alone = spec, Storage(spec.folder), True
        self._busy = Path(self._out.path(BUSY), f"{os.getpid()}.jsonl")
        self._busy.parent.mkdir(parents=True, exist_ok=True)
        self._share = float(np.random.default_rng(os.getpid()).uniform(0.05, 1.0))
        self._answer = ("word " * (spec.answer_bytes // 5 + 1))[: spec.answer_bytes]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: config.Sampling, max_tokens: Sequence[int]
    ) -> list[list[Completion]]:
        """Answers after the time that they take."""
        while self._alone and len(self._out.names(STARTS)) < self._spec.engines:
            time.sleep(0.5)
        self._alone = False
        seconds, self._share = self._share * self._spec.seconds(len(prompts)), 1.0
        if seconds:
            with self._busy.open("a") as file:
                file.write(json.dumps([time.time(), seconds]) + "\n")
            time.sleep(seconds)
        ids = [7] * self._spec.answer_tokens
        return [[Completion(self._answer, ids, -1.0, "stop", [])] for _ in prompts]

    def decode(self, ids: Sequence[int]) -> str:
        """Of no prefix."""
        return ""


class Bytes:
    """A renderer whose tokens are bytes."""

    def text_ids(self, text: str) -> list[int]:
        """Of an answer's prefix."""
        return list(text.encode())

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Of a conversation."""
        return list("|".join(m["content"] for m in messages).encode())


def length(conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> NDArray[np.float32]:
    """A reward that costs nothing."""
    return np.array([len(r) for r in responses], np.float32)


def slow_length(conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> NDArray[np.float32]:
    """A reward that takes `SLOW_S` for a block."""
    time.sleep(SLOW_S)
    return length(conversations, responses)
