"""The network that learns: a frozen base with LoRA and its control rows, or all of it; answers' log-probs out of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrlray import config
from ctrlray.objectives.losses import Loss, clm, exmate, sequence_mean
from ctrlray.train.attention import MULTIPLES, TreePath, choose_path, run_packed
from ctrlray.train.batches import Batch, TreeRow, collate
from ctrlray.train.logprobs import Head, target_logp

CRITIC, ORIGIN = "critic", "origin"
"""Adapters beside the policy's: the critic's own, and one that takes away what the model that PPO started from had learned."""


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
        self.frozen = False
        """Give the base's rows instead of those that train."""

    @property
    def weight(self) -> Tensor:
        """The frozen table, where callers look for its dtype and device."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings of shape [..., D] in the base's dtype."""
        frozen: Tensor = self.base(input_ids)
        if self.frozen:
            return frozen
        slot = input_ids - self.first
        inside = (slot >= 0) & (slot < len(self.rows))
        picked = self.rows[slot.clamp(0, len(self.rows) - 1)].to(frozen.dtype)
        return torch.where(inside[..., None], picked, frozen)


class Reader(nn.Module):
    """A causal network that reads packed batches of tree rows; what learns from them is built on it."""

    def __init__(self, network: Any, compute: torch.dtype, device: str = "cpu", path: TreePath | None = None) -> None:
        super().__init__()
        self.network = network
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

    def autocast(self) -> torch.autocast:
        """Products in the dtype that the processor computes in."""
        return torch.autocast(self.device_type, self.compute, enabled=self.compute != torch.float32)

    def answer_logp(self, batch: Batch) -> Tensor:
        """Log-probs of the answers' tokens in nats, shape [N, T], 0 where the mask is 0. Logits exist only where answers are."""
        with self.autocast():
            hidden = self.hidden(batch)  # [R, S, D]
            picked = target_logp(Head.of(self.network), at_answers(hidden, batch), batch.target_NT[batch.mask_NT.bool()])
        return spread(picked, batch) + 0.0 * hidden.sum()  # an empty batch still reaches every parameter

    def hidden(self, batch: Batch, network: Any = None) -> Tensor:
        """Hidden states [R, S, D] of this network, or of another of its kind."""
        network = network or self.network
        if self.shares:
            return run_packed(network, self.path, batch.input_ids_RS[0], batch.position_ids_RS[0], batch.spans_K4)
        out = network.base_model(input_ids=batch.input_ids_RS, attention_mask=batch.present_RS.long(), use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden


def at_answers(hidden_RSD: Tensor, batch: Batch) -> Tensor:
    """Hidden states that predict the answers' tokens, those that the mask counts, [number of them, D]."""
    return hidden_RSD.flatten(0, 1)[batch.source_NT[batch.mask_NT.bool()]]


def spread(counted: Tensor, batch: Batch) -> Tensor:
    """Values of the counted tokens back in their places: float32 [N, T], 0 elsewhere."""
    out = torch.zeros(batch.mask_NT.shape, dtype=torch.float32, device=counted.device)
    return out.masked_scatter(batch.mask_NT.bool(), counted.float())


class Learner(Reader):
    """A network and its loss in one module, so that sharded engines gather parameters inside forward."""

    def __init__(
        self, network: Any, objective: config.Likelihood, compute: torch.dtype, device: str = "cpu", path: TreePath | None = None
    ) -> None:
        super().__init__(network, compute, device, path)
        self.objective = objective

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
    network, path = load_network(folder, settings, control_ids, dtype, device)
    return Learner(network, objective, getattr(torch, dtype), device, path).to(device)


def load_network(
    folder: str, settings: config.Optimization, control_ids: Sequence[int], dtype: str, device: str
) -> tuple[Any, TreePath]:
    """The network of a folder, ready to train, and how it reads packed rows."""
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
    return network, path


def add_lora(network: Any, lora: config.LoRA, name: str = "default") -> None:
    """Put LoRA adapters in float32 beside every linear layer but the output layer; they train, nothing else changes.

    Another set, of another name, lies beside the first, which stays the active one.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_linear_names(network))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second set is meant
        inject_adapter_in_model(settings, network, adapter_name=name)
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the small matrices; PEFT would keep a copy of every input
            module._active_adapter = ["default"]
    for parameter_name, parameter in network.named_parameters():
        if "lora_" in parameter_name and f".{name}." in parameter_name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _linear_names(network: Any) -> list[str]:
    """Last names of the linear layers but the output layer; those that adapters wrap already count by their own name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = network.get_output_embeddings()
    found = set()
    for name, module in network.named_modules():
        own = ".lora_" not in name
        if own and isinstance(module, nn.Linear | BaseTunerLayer) and module is not head:
            found.add(name.removesuffix(".base_layer").rsplit(".", 1)[-1])
    return sorted(found)


def add_origin(network: Any, lora: config.LoRA, learned: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Put an adapter ORIGIN beside the others, never trained, that undoes an adapter merged into the network: W = W' - s B A.

    Active alone, it makes the network the one that `learned` was trained on, but for control rows and the rounding of the merge;
    it costs an adapter, not a second copy of the network.
    """
    from peft.tuners.lora import LoraLayer

    add_lora(network, lora.model_copy(update={"dropout": 0.0, "alpha": card["lora_scale"] * lora.rank}), ORIGIN)
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            low, high = module.lora_A[ORIGIN].weight, module.lora_B[ORIGIN].weight
            low.requires_grad_(False).copy_(learned[f"{name}.weight.lora_A"])
            high.requires_grad_(False).copy_(-learned[f"{name}.weight.lora_B"])


def beside(name: str) -> bool:
    """Whether a parameter belongs to an adapter beside the policy's."""
    return f".{CRITIC}." in name or f".{ORIGIN}." in name


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
    learner: Reader, lora: config.LoRA | None, control_ids: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What training changed, by checkpoint name, and the card that says how to merge it: see `ctrlray.adapter`."""
    state = {}
    for name, parameter in learner.network.named_parameters():
        if not parameter.requires_grad or beside(name):
            continue
        state[stored_name(name)] = parameter.detach().float().cpu().contiguous()
    return state, adapter_card(lora, control_ids)


def stored_name(name: str) -> str:
    """A parameter's name in a checkpoint or an adapter, without what PEFT and the control rows wrap around it."""
    name = name.replace(".base_layer.", ".").replace(".base.weight", ".weight")
    return name.replace(".default.weight", "").replace(".lora_", ".weight.lora_").replace(".rows", ".weight.rows")


def adapter_card(lora: config.LoRA | None, control_ids: Sequence[int]) -> dict[str, Any]:
    """How what training changed is merged: see `ctrlray.adapter`."""
    return {"lora_scale": lora.alpha / lora.rank if lora else 0.0, "control_ids": list(control_ids)}
