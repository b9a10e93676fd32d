"""DeepSpeed: its settings from the job, and the few calls the training loop makes of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrlray import config
from ctrlray.errors import DataError
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


def _adamw(groups: list[dict[str, Any]], rate: float, *, on_host: bool) -> torch.optim.Optimizer:
    """AdamW; `on_host` DeepSpeed's own, written for moments that lie in host memory."""
    if not on_host:
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=rate, betas=(0.9, 0.95), adamw_mode=True)
    return made


PHASES = ("forward", "backward", "optimizer")
_VALUE, _MOMENTS = "value", ("exp_avg", "exp_avg_sq")
_FLAT_PARTS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""Where DeepSpeed's ZeRO 1 and 2, ZeRO 3, and bfloat16 optimizers keep what Adam works on."""


class Trainer:
    """A network that computes its own loss, inside a DeepSpeed engine.

    `network(batch, **totals)` gives a Loss, a share of the whole batch's: shares add up over micro batches and ranks. A batch
    is a NamedTuple of tensors and of other batches.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: list[dict[str, Any]],
        settings: config.Optimization,
        *,
        gpu: bool,
        bf16_masters: bool = False,
    ) -> None:
        import deepspeed

        self._on_host = settings.offload != "none"
        self._adam = _adamw(groups, settings.learning_rate, on_host=self._on_host)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=self._adam,
            config=deepspeed_settings(settings, gpu=gpu, bf16_masters=bf16_masters),
            dist_init_required=False,
        )
        self.phases = dict.fromkeys(PHASES, 0.0)
        """Seconds of the last step as the host saw them; a GPU works on behind it. Ranks meet in backward and optimizer."""
        self._rates = [g["lr"] for g in groups]
        self._stage = settings.zero_stage

    def step(self, batches: Sequence[Any], rate: float, *, ranks: int, **totals: float) -> dict[str, float]:
        """One optimizer step over this rank's micro batches; `totals` are of all ranks. Returns the summed parts."""
        for group, base in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        parts: dict[str, float] = {}
        self.phases = dict.fromkeys(PHASES, 0.0)
        for i, batch in enumerate(batches):
            with self._timed("forward"):
                loss: Loss = self.engine(self.placed(batch), **totals)
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            with self._timed("backward"):
                self.engine.backward(loss.total * ranks)  # the engine averages over ranks, the totals already divide by all
            with self._timed("optimizer"):
                self.engine.step()
            for name, value in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + float(value)
        norm = self.engine.get_global_grad_norm()
        return parts | ({} if norm is None else {"grad_norm": float(norm)})

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.phases[phase] += time.perf_counter() - began

    def measure(self, batch: Any, **asked: Any) -> Tensor:
        """What the network gives for a batch without totals, without gradients, in float32 on the host."""
        self.engine.eval()
        with torch.no_grad():
            values: Tensor = self.engine(self.placed(batch), **asked)
        self.engine.train()
        return values.float().cpu()

    def placed(self, batch: Any) -> Any:
        """The batch on the engine's device, batches inside of it too."""
        return type(batch)(*(self.placed(t) if isinstance(t, tuple) else t.to(self.engine.device) for t in batch))

    def snapshot(self) -> dict[str, Tensor]:
        """What training has changed, by name, whole and in float32: parameters and Adam's moments.

        Every rank must call it; the tensors are on the host of each. Nothing in it depends on ranks or ZeRO stage.
        """
        found: dict[str, Tensor] = {}
        self._link_moments()
        for name, parameter in self._trained():
            for kind in (_VALUE, *_MOMENTS):
                found[f"{name}.{kind}"] = self._whole(parameter, kind).float().cpu().clone()
        return found

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a snapshot that was taken after `steps` optimizer steps, whatever ranks and ZeRO stage took it.

        Raises DataError when it is not of this network.
        """
        wanted = {f"{name}.{kind}" for name, _ in self._trained() for kind in (_VALUE, *_MOMENTS)}
        if odd := sorted(wanted ^ set(state)):
            raise DataError(f"the snapshot is of another network: {odd[0]!r} and {len(odd) - 1} more are on one side only")
        self._make_moments(steps)
        for name, parameter in self._trained():
            self._set(parameter, {kind: state[f"{name}.{kind}"] for kind in (_VALUE, *_MOMENTS)})

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.engine.module.named_parameters() if p.requires_grad]

    @property
    def _plain(self) -> bool:
        """The optimizer holds the parameters themselves, not flat parts of them."""
        return self.optimizer is self._adam

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._plain:
            value = parameter.detach() if kind == _VALUE else self._adam.state[parameter][kind]
        elif kind == _VALUE:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        assert isinstance(value, Tensor)
        return value

    def _make_moments(self, steps: int) -> None:
        """Adam makes its moments in its first step; a restored one has them before that."""
        held = self.optimizer
        parts = (
            [p for _, p in self._trained()]
            if self._plain
            else next(getattr(held, name) for name in _FLAT_PARTS if hasattr(held, name))
        )
        for part in parts:
            moments = {kind: torch.zeros_like(part, memory_format=torch.preserve_format).detach() for kind in _MOMENTS}
            self._adam.state[part] = {"step": steps if self._on_host else torch.tensor(float(steps))} | moments
        self._link_moments()

    def _link_moments(self) -> None:
        """ZeRO 1 and 2 link parameters to their moments in flat parts once: after the step of the first group, for all groups."""
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        placed = {kind: value.to(self.engine.device) for kind, value in values.items()}
        sharded = self._stage == 3
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            parameter.copy_(placed[_VALUE])
        for kind in _MOMENTS:
            if self._plain:
                self._adam.state[parameter][kind].copy_(placed[kind])
            else:
                safe_set_full_optimizer_state(parameter, placed[kind], kind)
        if not self._plain:
            safe_set_full_fp32_param(parameter, placed[_VALUE])

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Any]:
        """The network with its trained parameters whole on every rank (ZeRO-3 shards them)."""
        import deepspeed

        network: nn.Module = self.engine.module
        mine = [p for p in network.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(mine) if self._stage == 3 else contextlib.nullcontext():
            yield network
