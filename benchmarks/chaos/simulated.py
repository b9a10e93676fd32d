"""Simulated engines and slowed rewards: an answer follows from its request and the weights in force, so every run must agree.

Only `benchmarks.chaos.driver` puts them into a run; no setting of a job can.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrlray.adapter import merged_tensors, tensor_names
from ctrlray.config import Sampling
from ctrlray.engine.engine import Completion, Engine, EngineSpec
from ctrlray.engine.probes import Given, Held, compare

CORE = Path(__file__).parent / "core.py"
PACE_S = 0.1
"""Seconds that an answer takes, and half as many that a score takes: a stage is at work long enough to be watched."""


@dataclass(frozen=True)
class SimulatedSpec(EngineSpec):
    """Recipe of a simulated engine."""

    def build(self) -> Engine:
        """A simulated one."""
        return SimulatedEngine(self)


class SimulatedEngine(Engine):
    """Answers from a hash of prompt and weights, in a child process, as vLLM's engines on GPUs have one."""

    def __init__(self, spec: EngineSpec) -> None:
        from tokenizers import Tokenizer

        self.spec, self.weights_version = spec, 0
        self._weights = _as_started(spec.model)
        self._tokenizer = Tokenizer.from_file(str(Path(spec.model) / "tokenizer.json"))
        config = json.loads((Path(spec.model) / "config.json").read_text())
        self._end = int(config["eos_token_id"])
        self._core = subprocess.Popen([sys.executable, str(CORE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, max_tokens: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """One answer per prompt. Raises RuntimeError when the child is gone."""
        assert n == 1
        limits = list(max_tokens or [sampling.max_tokens] * len(prompts))
        return [[self._completion(*made)] for made in self._ask(prompts, limits)]

    def logp(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """What the weights in force give each answer. Raises RuntimeError when the child is gone."""
        return self._ask(contexts, [list(map(int, a)) for a in answers])

    def _ask(self, prompts: Sequence[Sequence[int]], asked: Sequence[Any]) -> list[Any]:
        """The child's answers, each to a prompt and what is asked of it: at most so many tokens, or the log-prob of these."""
        request = {"prompts": [list(map(int, p)) for p in prompts], "asked": asked, "weights": self._weights, "pace_s": PACE_S}
        assert self._core.stdin is not None and self._core.stdout is not None
        self._core.stdin.write(json.dumps(request) + "\n")
        self._core.stdin.flush()
        line = self._core.stdout.readline()
        if not line:
            raise RuntimeError("the simulated engine's child process is gone")
        return list(json.loads(line))

    def _completion(self, text: str, reason: str, logprobs: list[float]) -> Completion:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids + ([self._end] if reason == "stop" else [])
        return Completion(text, ids, sum(logprobs), reason, logprobs, self.weights_version)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(list(token_ids)))

    def _replace(self, folder: str, adapter: Mapping[str, Any], card: Mapping[str, Any], version: int) -> Held:
        """Read the weights as an engine would, and answer from their hash from now on."""
        given = Given(folder, tensor_names(folder), card["control_ids"])
        tensors = given.watch(merged_tensors(folder, adapter, card, self.spec.dtype))
        self._weights, self.weights_version = _identity((name, value.float().numpy()) for name, value in tensors), version
        return Held(version, compare(given, [given.sums]), given.seconds, 0.0)

    def cache_hits(self) -> tuple[int, int]:
        """It has no cache."""
        return 0, 0


def _as_started(folder: str) -> str:
    """Identity of a folder's own weights, by numpy alone: an engine that is given none need not import torch."""
    from safetensors import safe_open

    def tensors() -> Iterator[tuple[str, Any]]:
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  safe_open is not a dict
                    yield name, opened.get_tensor(name)

    return _identity(tensors())


def _identity(tensors: Iterable[tuple[str, Any]]) -> str:
    """Of float32 weights: equal ones have equal ones, whichever way an engine came by them."""
    seen = hashlib.sha256()
    for name, value in tensors:
        seen.update(name.encode() + value.astype("float32", copy=False).tobytes())
    return seen.hexdigest()


def slow_lengths(prompts: list[Any], responses: list[str]) -> dict[str, list[float]]:
    """Brevity and variety of an answer, at a pace that leaves time to kill the actor."""
    time.sleep(PACE_S / 2 * len(responses))
    return {
        "brevity": [-float(len(r)) for r in responses],
        "variety": [float(len(set(r))) for r in responses],
    }
