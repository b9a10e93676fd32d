"""DeepSpeed: its settings from the job, and the few calls the training loop makes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrlray import config
from ctrlray.objectives.losses import Loss


def deepspeed_settings(settings: config.Optimization, *, gpu: bool, bf16_masters: bool) -> dict[str, Any]:
    """DeepSpeed's config. One engine step is one optimizer step: the loop says where accumulation ends."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {
            "stage": settings.zero_stage,
            # gloo has no reduce_scatter of its own
            **({} if gpu else {"reduce_scatter": False, "overlap_comm": False}),
            **({"offload_optimizer": {"device": "cpu", "pin_memory": True}} if settings.offload != "none" else {}),
            **({"offload_param": {"device": "cpu", "pin_memory": True}} if settings.offload == "all" else {}),
        },
        "bf16": {"enabled": bf16_masters},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of `steps`, then cosine decay to zero; `step` counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / max(1, steps - rising + 1)))


class Trainer:
    """A network that computes its own loss, inside a DeepSpeed engine.

    `network(batch, **totals)` gives a Loss, a share of the whole batch's: shares add up over micro batches and ranks. A batch
    is a NamedTuple of tensors.
    """

    def __init__(self, network: nn.Module, groups: list[dict[str, Any]], settings: config.Optimization, *, gpu: bool) -> None:
        import deepspeed

        masters = gpu and any(p.dtype == torch.bfloat16 for g in groups for p in g["params"])
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_settings(settings, gpu=gpu, bf16_masters=masters),
            dist_init_required=False,
        )
        self._rates = [g["lr"] for g in groups]
        self._stage = settings.zero_stage

    def step(self, batches: Sequence[Any], rate: float, *, ranks: int, **totals: float) -> dict[str, float]:
        """One optimizer step over this rank's micro batches; `totals` are of all ranks. Returns the summed parts."""
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        parts: dict[str, float] = {}
        for i, batch in enumerate(batches):
            loss: Loss = self.engine(self.placed(batch), **totals)
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            self.engine.backward(loss.total * ranks)  # the engine averages over ranks, the totals already divide by all
            self.engine.step()
            for name, value in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + float(value)
        norm = self.engine.get_global_grad_norm()
        return parts | ({} if norm is None else {"grad_norm": float(norm)})

    def measure(self, batch: Any) -> Tensor:
        """What the network gives for a batch without totals, without gradients, in float32 on the host."""
        self.engine.eval()
        with torch.no_grad():
            values: Tensor = self.engine(self.placed(batch))
        self.engine.train()
        return values.float().cpu()

    def placed(self, batch: Any) -> Any:
        """The batch on the engine's device."""
        return type(batch)(*(t.to(self.engine.device) for t in batch))

    def save(self, folder: Path) -> None:
        """Everything needed to go on: trained parameters, optimizer, per rank."""
        self.engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Any]:
        """The network with its trained parameters whole on every rank (ZeRO-3 shards them)."""
        import deepspeed

        network: nn.Module = self.engine.module
        mine = [p for p in network.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(mine) if self._stage == 3 else contextlib.nullcontext():
            yield network
