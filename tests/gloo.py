"""A group beside torch's own, over gloo: where no GPU is, it stands for vLLM's NCCL communicator on both sides."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

_WAIT = timedelta(seconds=300)


class Gloo:
    """Rank 0 is the trainer's end, as `ctrlray.train.ppo.transfer.Group`; others are processes of engines."""

    def __init__(self, address: str, port: int, world_size: int, rank: int = 0) -> None:
        import torch.distributed as dist

        store = dist.TCPStore(address, port, world_size, rank == 0, _WAIT)
        self._group = dist.ProcessGroupGloo(store, rank, world_size, _WAIT)

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        self._group.broadcast(tensor, src).wait()

    def send(self, tensor: Any) -> None:
        self.broadcast(tensor.contiguous(), 0)

    def flush(self) -> None:
        """`broadcast` has waited."""

    def close(self) -> None:
        self._group = None

    destroy = close
