"""Real gloo ranks in processes of their own, each with DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(ranks: int, work: Callable[..., None], folder: Path, *given: Any) -> None:
    """`work(rank, ranks, folder, *given)` on every rank of a process group; raises when one does."""
    import torch.multiprocessing as mp

    (folder / "group").unlink(missing_ok=True)
    mp.spawn(_rank, (ranks, work, folder, given), nprocs=ranks)


def _rank(rank: int, ranks: int, work: Callable[..., None], folder: Path, given: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    work(rank, ranks, folder, *given)
    dist.barrier()
    dist.destroy_process_group()
