"""What training changed in a checkpoint, and how it is merged back: W' = W + (alpha / rank) B A (arXiv 2106.09685, eq. 3).

An adapter maps names to tensors: `<weight>.lora_A` [rank, in] with `<weight>.lora_B` [out, rank], `<embedding>.rows` (the
control rows alone), or `<weight>` itself, whole. Its card has `lora_scale` (alpha / rank) and `control_ids`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrlray.errors import ConfigError

if TYPE_CHECKING:  # engines' recipes are made where torch is not needed
    from torch import Tensor

ADAPTER = "adapter.safetensors"
ADAPTER_CARD = "adapter.json"
_PARTS = (".lora_A", ".lora_B", ".rows")


def merge(base: str, adapter: str, out: str, dtype: str | None = None) -> None:
    """Write the base folder with an adapter folder merged into its weights. Shard by shard, without building the network."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    changes = load_file(Path(adapter) / ADAPTER)
    card = json.loads((Path(adapter) / ADAPTER_CARD).read_text())
    check_homes(base, changes)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(base).iterdir()):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
            continue
        with safe_open(file, framework="pt") as source:
            meta = source.metadata()
        tensors = dict(_merged_file(file, changes, card, getattr(torch, dtype) if dtype else None))
        save_file(tensors, target / file.name, metadata=meta or {"format": "pt"})


def merged_tensors(
    folder: str, adapter: Mapping[str, Tensor], card: Mapping[str, Any], dtype: str
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint folder with an adapter merged into it, as the folder orders them.

    The folder's files are mapped into memory, not read into it, and a tensor is made when it is asked for.
    """
    import torch

    for file in sorted(Path(folder).glob("*.safetensors")):
        yield from _merged_file(file, adapter, card, getattr(torch, dtype))


def _merged_file(
    file: Path, adapter: Mapping[str, Tensor], card: Mapping[str, Any], dtype: Any | None
) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as source:
        for name in source.keys():  # noqa: SIM118  safe_open is not a dict
            value = source.get_tensor(name)
            yield name, merged(name, value, adapter, card).to(dtype or value.dtype)


def merged(name: str, value: Tensor, adapter: Mapping[str, Tensor], card: Mapping[str, Any]) -> Tensor:
    """A checkpoint tensor with its part of the adapter, in float32; as it was where there is none."""
    import torch

    if name in adapter:
        return adapter[name]
    low, high, rows = (adapter.get(name + part) for part in _PARTS)
    if low is not None and high is not None:
        value = torch.addmm(value.float(), high.float(), low.float(), alpha=card["lora_scale"])
    if rows is not None:
        value = value.to(torch.float32, copy=True)
        value[list(card["control_ids"])] = rows.float()
    return value


def check_homes(folder: str, adapter: Mapping[str, Any]) -> None:
    """Raise ConfigError when a tensor of the adapter belongs to none of the folder's, or a LoRA matrix lacks its other half."""
    known = tensor_names(folder)
    strays = sorted(n for n in adapter if n not in known and home(n) not in known)
    if strays:
        raise ConfigError(f"adapter tensors without a home in {folder}: {strays[:3]}; was it trained from another base?")
    halves = {n: n[:-1] + ("B" if n.endswith("A") else "A") for n in adapter if n.endswith((".lora_A", ".lora_B"))}
    if widows := sorted(n for n, other in halves.items() if other not in adapter):
        raise ConfigError(f"adapter tensors without their other half: {widows[:3]}")


def home(name: str) -> str:
    """The checkpoint tensor that a tensor of an adapter belongs to."""
    part = next((p for p in _PARTS if name.endswith(p)), "")
    return name.removesuffix(part)


def tensor_names(folder: str) -> set[str]:
    """Names of all tensors in a safetensors folder."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            names |= set(tensors.keys())
    return names
