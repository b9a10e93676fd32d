"""A network's weights as its checkpoint has them, merged a layer at a time, and the NCCL group that they are sent over.

    layer 0: gather its shards -> merge its adapters, tensor by tensor -> send -> let it go -> layer 1 ...

Under ZeRO-3 no rank ever has more than one layer whole.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctrlray.adapter import home, merged
from ctrlray.errors import ClusterError

_LAYER = re.compile(r"^(.*?\.\d+)\.")


class Layers:
    """The tensors of a network's checkpoint, in the network's own order."""

    def __init__(self, network: nn.Module, card: Mapping[str, Any], *, sharded: bool) -> None:
        from ctrlray.train.models import beside, stored_name

        self._card, self._sharded = card, sharded
        self._layers: dict[str, dict[str, nn.Parameter]] = {}
        for raw, parameter in network.named_parameters():
            if not beside(raw):
                name = stored_name(raw)
                self._layers.setdefault(layer_of(name), {})[name] = parameter

    def shapes(self) -> dict[str, list[int]]:
        """Whole shapes by name, in the order in which the tensors come."""
        whole = {n: p for layer in self._layers.values() for n, p in layer.items() if home(n) == n}
        return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in whole.items()}

    def merged(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with its part of the adapter, rounded once; every rank must go through them all alike."""
        for layer in self.gathered():
            parts = {n: p.detach() for n, p in layer.items() if home(n) != n}
            for name, parameter in layer.items():
                if name not in parts:
                    yield name, merged(name, parameter.detach(), parts, self._card).to(dtype)

    def gathered(self) -> Iterator[dict[str, nn.Parameter]]:
        """The parameters of one layer after another, whole while they are out."""
        for layer in self._layers.values():
            with _whole(layer.values()) if self._sharded else contextlib.nullcontext():
                yield layer


def _whole(parameters: Iterable[nn.Parameter]) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, or itself: `model.layers.3.mlp.up_proj.weight` to `model.layers.3`."""
    found = _LAYER.match(name)
    return found[1] if found else home(name)


class Group:
    """The trainer's end of an NCCL group with engines, by vLLM's own communicator, which is apart from torch's groups.

    Everything is sent in the order of the current stream, in which the tensors are made. Raises ClusterError where vLLM found no
    NCCL: it would send nothing and say nothing.
    """

    def __init__(self, address: str, port: int, world_size: int) -> None:
        from vllm.distributed.weight_transfer import nccl_common

        torch.cuda.set_stream(torch.cuda.current_stream())  # vLLM notes it; else it puts a stream of its own in its place
        place = {"master_address": address, "master_port": port, "world_size": world_size}
        self._communicator = nccl_common.trainer_init(place)  # waits until all have joined
        if self._communicator.disabled:
            raise ClusterError("vLLM has no NCCL in the trainer: unset VLLM_DISABLE_PYNCCL, or set transfer: file for ppo")

    def send(self, tensor: Tensor) -> None:
        """To every process of every engine."""
        there = tensor.to(self._communicator.device).contiguous()
        self._communicator.broadcast(there, src=0, stream=torch.cuda.current_stream())

    def flush(self) -> None:
        """Wait until all that was sent is there."""
        torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Leave the group."""
        self._communicator.destroy()
