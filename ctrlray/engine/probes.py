"""Proof that an engine computes with the weights it was given: sums of a few tensors, on their way to it and in it.

    first qkv, last qkv   the attention projection of the first and of the last layer, where LoRA shows
    embedding             the whole input embedding
    control rows          its control rows alone: among 49,000 others an update of six rows drowns

A checkpoint whose names are not understood lacks the probes in question; one without any is refused.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ctrlray.errors import ConfigError

if TYPE_CHECKING:  # engines' recipes are made where torch is not needed
    from torch import Tensor

_QKV = re.compile(r"\.(\d+)\..*\b(q_proj|k_proj|v_proj|qkv_proj|query_key_value)\.weight$")
_EMBEDDING = re.compile(r"\b(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_ROUNDING = 1e-12
"""Both sides add up the very same numbers, rounded to the engine's dtype before; only the order of float64 additions differs."""
_BLOCK_ROWS = 1024
"""A power of two."""


class Probe(NamedTuple):
    """One sum, as it must be and as it is."""

    expected: float
    found: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree; a NaN agrees with nothing."""
        return abs(self.found - self.expected) <= self.tolerance


class Held(NamedTuple):
    """The weights that an engine holds after an update."""

    version: int
    probes: dict[str, Probe]
    merge_s: float
    reload_s: float

    @property
    def checksums(self) -> dict[str, float]:
        """What the engine itself holds, to compare with other engines."""
        return {name: probe.found for name, probe in self.probes.items()}


class Expected(NamedTuple):
    """Sums of the probes as another process saw them on their way."""

    sums: Mapping[str, float]
    sizes: Mapping[str, float]


class Given:
    """Watches checkpoint tensors on their way to an engine."""

    def __init__(self, folder: str, names: Collection[str], control_ids: Sequence[int]) -> None:
        layers = sorted({int(m[1]) for n in names if (m := _QKV.search(n))})
        self._ends = [("first qkv", layers[0]), ("last qkv", layers[-1])] if layers else []
        self._control_ids = list(control_ids)
        self.sums: dict[str, float] = {}
        self.sizes: dict[str, float] = {}
        """Sums of absolute values, which rounding is in proportion to."""
        self.seen: set[str] = set()
        self.seconds = 0.0
        """Time that making the tensors took."""
        if not layers and not any(_EMBEDDING.search(n) for n in names):
            raise ConfigError(f"{folder}: none of its tensors is known by name, so no update of its weights can be proved")

    def watch(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass tensors on."""
        while True:
            begun = time.perf_counter()
            item = next(tensors, None)
            if item is not None:
                self._see(*item)
            self.seconds += time.perf_counter() - begun
            if item is None:
                return
            yield item

    def _see(self, name: str, value: Tensor) -> None:
        self.seen.add(name)
        if found := _QKV.search(name):
            for probe, layer in self._ends:
                if layer == int(found[1]):
                    self._add(probe, value)
        elif _EMBEDDING.search(name):
            self._add("embedding", value)
            if self._control_ids:
                self._add("control rows", value[self._control_ids])

    def _add(self, probe: str, value: Tensor) -> None:
        import torch

        self.sums[probe] = self.sums.get(probe, 0.0) + _sum(value)
        self.sizes[probe] = self.sizes.get(probe, 0.0) + float(torch.linalg.vector_norm(value, 1))


def compare(given: Given | Expected, workers: Sequence[dict[str, float]]) -> dict[str, Probe]:
    """The probes by name; `workers` is what `in_network` found in each process of an engine, which share its layers."""
    found = {name: sum(w.get(name, float("nan")) for w in workers) for name in given.sums}
    return {n: Probe(given.sums[n], found[n], _ROUNDING * given.sizes[n]) for n in given.sums}


def in_network(network: Any, control_ids: Sequence[int]) -> dict[str, float]:
    """The probes of a live vLLM model, or of one worker's share of it."""
    sums: dict[str, float] = {}
    if layers := _of_class(network, "QKVParallelLinear"):
        sums |= {"first qkv": _qkv_sum(layers[0]), "last qkv": _qkv_sum(layers[-1])}
    heads = _of_class(network, "ParallelLMHead")
    if embeddings := [m for m in _of_class(network, "VocabParallelEmbedding") if m not in heads]:
        table, shard = embeddings[0].weight, embeddings[0].shard_indices
        first, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        sums["embedding"] = _sum(table[: end - first])  # below are rows that only pad it
        sums["control rows"] = _sum(table[[i - first for i in control_ids if first <= i < end]])
    return sums


def _of_class(network: Any, name: str) -> list[Any]:
    """Modules of a vLLM class, in the order of the layers; by name, because importing vLLM takes long."""
    return [m for m in network.modules() if any(kind.__name__ == name for kind in type(m).__mro__)]


def _qkv_sum(layer: Any) -> float:
    import torch

    q, k, v = torch.split(_weight(layer), layer.output_partition_sizes)
    return _sum(q) + (_sum(k) + _sum(v)) / int(layer.num_kv_head_replicas)


def _weight(layer: Any) -> Tensor:
    """What a layer multiplies by, [out, in]. On a CPU only its packed kernel has that, so the kernel is given the identity."""
    import torch

    if layer.weight.numel():
        weight: Tensor = layer.weight
        return weight
    unit = torch.eye(layer.input_size_per_partition, dtype=layer.params_dtype)
    rows: Tensor = layer.quant_method.apply(layer, unit)  # [in, out]
    return rows.T


def _sum(value: Tensor) -> float:
    """A matrix added up in float64, in an order of its own: torch's depends on the processor and its threads."""
    import torch

    rows = torch.zeros(_BLOCK_ROWS, value.shape[1], dtype=torch.float64, device=value.device)
    for block in torch.split(value, _BLOCK_ROWS):
        rows[: len(block)] += block
    while len(rows) > 1:
        rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
    return math.fsum(rows[0].tolist())
