"""Versions of the trained weights as files in storage: how engines without GPUs of their own get them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctrlray.tables import Storage

if TYPE_CHECKING:  # the driver needs no torch until it reads
    from torch import Tensor

WEIGHTS = "weights"
_KEPT = 3
"""Versions that stay in storage: the engines are at most one behind."""


def weights_name(version: int) -> str:
    """File of a version of the weights."""
    return f"{version:06d}.safetensors"


def write_weights(out: Storage, version: int, state: dict[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write a version, and remove those that nobody needs; the file is complete when it is there."""
    from safetensors.torch import save

    out.write_bytes(save(state, {"card": json.dumps(card)}), WEIGHTS, weights_name(version))
    for name in out.names(WEIGHTS, suffix=".safetensors")[:-_KEPT]:
        out.remove(WEIGHTS, name)


def newest_weights(out: Storage, least: int, most: int) -> int | None:
    """The newest version there is from `least` to `most`; version 0 is the model that training starts from."""
    for version in range(most, max(least, 1) - 1, -1):
        if out.exists(WEIGHTS, weights_name(version)):
            return version
    return 0 if least == 0 else None


def read_weights(out: Storage, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and the card that says how they are merged."""
    from safetensors.torch import load

    data = out.read_bytes(WEIGHTS, weights_name(version))
    size = int.from_bytes(data[:8], "little")  # the format: length of a JSON header, the header, the tensors
    card = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["card"])
    return load(data), card
