"""How weights travel from a trainer to engines on GPUs: who has which rank of their NCCL group, and what an engine is told.

    rank 0                    the trainer's first worker, which sends
    rank 1 + i * width + j    process j of engine i, of which each has `width` (tensor parallelism)

Nothing here computes: the fields are those of vLLM's weight-transfer API, which the engines call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BACKEND = "nccl"
"""vLLM's name for it."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Ranks(NamedTuple):
    """The members of a group beside the trainer."""

    engines: int
    width: int
    """Processes of one engine."""

    @property
    def world_size(self) -> int:
        """The trainer and all processes of all engines."""
        return 1 + self.engines * self.width

    def first(self, engine: int) -> int:
        """Rank of an engine's first process; vLLM adds the place of each process within its engine."""
        return 1 + engine * self.width


class Offer(NamedTuple):
    """What a trainer is about to send, in this order."""

    version: int
    ranks: Ranks
    address: str
    """Of the trainer's node."""
    port: int
    """Where a group is formed anew; 0 where the last one still stands."""
    dtype: str
    names: Sequence[str]
    shapes: Sequence[Sequence[int]]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Offer:
        """From JSON."""
        return cls(**{**raw, "ranks": Ranks(*raw["ranks"])})

    def joining(self, engine: int) -> dict[str, Any]:
        """What an engine joins the group with: fields of vLLM's NCCLWeightTransferInitInfo.

        Not packed: a tensor is sent when it is made, and may go when it is sent.
        """
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": self.ranks.first(engine),
            "world_size": self.ranks.world_size,
            "packed": False,
        }

    def contents(self) -> dict[str, Any]:
        """What an engine is to receive: fields of vLLM's NCCLWeightTransferUpdateInfo."""
        return {
            "names": list(self.names),
            "dtype_names": [self.dtype] * len(self.names),
            "shapes": [list(s) for s in self.shapes],
        }

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return BYTES[self.dtype] * sum(math.prod(s) for s in self.shapes)


class Received(NamedTuple):
    """What an engine says after it took weights from a trainer."""

    version: int
    sums: list[dict[str, float]]
    """Of its probes, for each of its processes."""
    seconds: float
