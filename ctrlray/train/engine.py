"""DeepSpeed: its settings from the job, and the few calls the training loop makes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrlray import config
from ctrlray.objectives.losses import Loss
from ctrlray.train.batches import Batch
from ctrlray.train.models import Learner, parameter_groups


def deepspeed_settings(settings: config.Train, *, gpu: bool, bf16_masters: bool) -> dict[str, Any]:
    """DeepSpeed's config. One engine step is one optimizer step: the loop says where accumulation ends."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {
            "stage": settings.zero_stage,
            # gloo has no reduce_scatter of its own
            **({} if gpu else {"reduce_scatter": False, "overlap_comm": False}),
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
    """A learner inside a DeepSpeed engine."""

    def __init__(self, learner: Learner, settings: config.Train, *, gpu: bool) -> None:
        import deepspeed

        full_bf16 = gpu and settings.lora is None and learner.compute == torch.bfloat16
        groups = parameter_groups(learner, settings)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=learner,
            optimizer=optimizer,
            config=deepspeed_settings(settings, gpu=gpu, bf16_masters=full_bf16),
            dist_init_required=False,
        )
        self._rates = [g["lr"] for g in groups]
        self._stage = settings.zero_stage

    def step(self, batches: list[Batch], rate: float, *, num_tokens: float, num_wrong: float, ranks: int) -> dict[str, float]:
        """One optimizer step over this rank's micro batches; the totals are of all ranks. Returns the summed parts."""
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        parts: dict[str, float] = {}
        for i, batch in enumerate(batches):
            loss: Loss = self.engine(self._placed(batch), num_tokens=num_tokens, num_wrong=num_wrong)
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            self.engine.backward(loss.total * ranks)  # the engine averages over ranks, the totals already divide by all
            self.engine.step()
            for name, value in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + float(value)
        norm = self.engine.get_global_grad_norm()
        return parts | ({} if norm is None else {"grad_norm": float(norm)})

    def mean_logp(self, batch: Batch) -> Tensor:
        """Mean log-prob per answer in nats, without gradients, shape [N]."""
        self.engine.eval()
        with torch.no_grad():
            values: Tensor = self.engine(self._placed(batch))
        self.engine.train()
        return values.float().cpu()

    def save(self, folder: Path) -> None:
        """Everything needed to go on: trained parameters, optimizer, per rank."""
        self.engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Learner]:
        """The learner with its trained parameters whole on every rank (ZeRO-3 shards them)."""
        import deepspeed

        learner: Learner = self.engine.module
        mine = [p for p in learner.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(mine) if self._stage == 3 else contextlib.nullcontext():
            yield learner

    def _placed(self, batch: Batch) -> Batch:
        return Batch(*(t.to(self.engine.device) for t in batch))
