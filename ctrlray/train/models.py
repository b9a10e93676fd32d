"""The network that learns: a frozen base with LoRA and its control rows, or all of it; answers' log-probs out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrlray import config
from ctrlray.objectives.losses import Loss, clm, exmate, sequence_mean
from ctrlray.train.attention import MULTIPLES, TreePath, choose_path, run_packed
from ctrlray.train.batches import Batch, TreeRow, collate
from ctrlray.train.logprobs import Head, target_logp


class ControlRows(nn.Module):
    """An input embedding whose control rows train while the rest stays frozen.

    A small table of its own: PEFT's trainable token rows clone the whole matrix in every forward pass.
    """

    def __init__(self, base: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__()
        if list(ids) != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(f"control ids must be consecutive, got {list(ids)}")
        self.base = base
        self.first = ids[0]
        self.rows = nn.Parameter(base.weight.detach()[list(ids)].float().clone())

    @property
    def weight(self) -> Tensor:
        """The frozen table, where callers look for its dtype and device."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings of shape [..., D] in the base's dtype."""
        frozen: Tensor = self.base(input_ids)
        slot = input_ids - self.first
        inside = (slot >= 0) & (slot < len(self.rows))
        picked = self.rows[slot.clamp(0, len(self.rows) - 1)].to(frozen.dtype)
        return torch.where(inside[..., None], picked, frozen)


class Learner(nn.Module):
    """The policy and its loss in one module, so that sharded engines gather parameters inside forward."""

    def __init__(
        self, network: Any, objective: config.Likelihood, compute: torch.dtype, device: str = "cpu", path: TreePath | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.compute = compute
        self.device_type = device
        self.path: TreePath = path or choose_path(network, gpu=device == "cuda")
        """How attention reads a batch; `separate` cannot share prompts."""

    @property
    def shares(self) -> bool:
        """Whether one pass can hold a prompt once and several answers to it."""
        return self.path != "separate"

    def collated(self, rows: Sequence[TreeRow], pad_id: int) -> Batch:
        """A micro batch in the layout that this network's attention reads."""
        return collate(rows, pad_id, packed=self.shares, multiple=MULTIPLES.get(self.path, 1))

    def forward(self, batch: Batch, num_tokens: float = 0.0, num_wrong: float = 0.0) -> Loss | Tensor:
        """The loss of a micro batch; with `num_tokens=0` the answers' mean log-probs, shape [N]."""
        logp = self.answer_logp(batch)
        if not num_tokens:
            return sequence_mean(logp, batch.mask_NT)
        right, wrong = batch.right_N, ~batch.right_N
        own = (logp[right], batch.mask_NT[right], batch.weight_N[right])
        if self.objective.type == "clm":
            return clm(*own, num_tokens=num_tokens)
        return exmate(
            *own,
            logp[wrong],
            batch.mask_NT[wrong],
            weight=self.objective.weight,
            num_tokens=num_tokens,
            num_wrong=max(num_wrong, 1.0),
            reduction=self.objective.reduction,
        )

    def answer_logp(self, batch: Batch) -> Tensor:
        """Log-probs of the answers' tokens in nats, shape [N, T], 0 where the mask is 0. Logits exist only where answers are."""
        counted = batch.mask_NT.bool()
        with torch.autocast(self.device_type, self.compute, enabled=self.compute != torch.float32):
            hidden = self._hidden(batch)  # [R, S, D]
            picked = target_logp(Head.of(self.network), hidden.flatten(0, 1)[batch.source_NT[counted]], batch.target_NT[counted])
        out = torch.zeros(batch.mask_NT.shape, dtype=torch.float32, device=picked.device)
        spread: Tensor = out.masked_scatter(counted, picked)
        return spread + 0.0 * hidden.sum()  # an empty batch still reaches every parameter

    def _hidden(self, batch: Batch) -> Tensor:
        if self.shares:
            return run_packed(self.network, self.path, batch.input_ids_RS[0], batch.position_ids_RS[0], batch.spans_K4)
        out = self.network.base_model(input_ids=batch.input_ids_RS, attention_mask=batch.present_RS.long(), use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden


def load_learner(
    folder: str,
    objective: config.Likelihood,
    settings: config.Optimization,
    control_ids: Sequence[int],
    dtype: str,
    device: str,
) -> Learner:
    """The prepared base with its trainable parameters in float32 and everything else frozen in `dtype`.

    Raises ConfigError when the model's logits are not understood.
    """
    from transformers import AutoModelForCausalLM

    compute = getattr(torch, dtype)
    lora = settings.lora
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if lora is None else compute)
    network.to(device)
    Head.of(network).check(network.eval())
    path = choose_path(network, gpu=device == "cuda")
    if lora is not None:
        network.requires_grad_(False)
        add_lora(network, lora)
        if control_ids:
            network.set_input_embeddings(ControlRows(network.get_input_embeddings(), control_ids))
    if settings.activation_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.train()
    return Learner(network, objective, compute, device, path).to(device)


def add_lora(network: Any, lora: config.LoRA) -> None:
    """Put LoRA adapters in float32 beside every linear layer but the output layer; they train, nothing else changes."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = network.get_output_embeddings()
    names = sorted({n.rsplit(".", 1)[-1] for n, m in network.named_modules() if isinstance(m, nn.Linear) and m is not head})
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    inject_adapter_in_model(settings, network)
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the small matrices; PEFT would keep a copy of every input
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def parameter_groups(learner: Learner, settings: config.Train) -> list[dict[str, Any]]:
    """Optimizer groups: control rows at their own rate without decay, everything else at the learning rate."""
    rows = [p for n, p in learner.named_parameters() if p.requires_grad and n.endswith(".rows")]
    known = {id(p) for p in rows}
    rest = [p for p in learner.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": rest, "lr": settings.learning_rate, "weight_decay": settings.weight_decay}]
    if rows:
        groups.append({"params": rows, "lr": settings.control_rate, "weight_decay": 0.0})
    return groups


def trained_state(
    learner: Learner, lora: config.LoRA | None, control_ids: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What training changed, by checkpoint name, and the card that says how to merge it: see `ctrlray.adapter`."""
    state = {}
    for name, parameter in learner.network.named_parameters():
        if not parameter.requires_grad:
            continue
        clean = name.replace(".default.weight", "").replace(".lora_", ".weight.lora_").replace(".rows", ".weight.rows")
        state[clean] = parameter.detach().float().cpu().contiguous()
    scale = lora.alpha / lora.rank if lora else 0.0
    return state, {"lora_scale": scale, "control_ids": list(control_ids)}
