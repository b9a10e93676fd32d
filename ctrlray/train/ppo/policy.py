"""Policy, reference and critic over one frozen base. Shape key: N answers, T answer tokens, D hidden size."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.objectives.advantages import importance
from ctrlray.objectives.losses import Loss
from ctrlray.objectives.ppo import entropy_bonus, kl_loss, policy_loss, value_loss
from ctrlray.train.attention import TreePath, choose_path
from ctrlray.train.batches import Batch
from ctrlray.train.logprobs import Head, logp_and_entropy, target_logp
from ctrlray.train.models import CRITIC, ORIGIN, ControlRows, Reader, add_lora, add_origin, at_answers, load_network, spread


class Origin(NamedTuple):
    """The base that PPO's own start was trained from."""

    folder: str
    learned: Mapping[str, Tensor]
    """What that training changed, an adapter: see `ctrlray.adapter`."""
    card: Mapping[str, Any]


class PolicyBatch(NamedTuple):
    """A micro batch of rollouts, [N, T] each beside the tree: what the answers' tokens had before this step began."""

    tree: Batch
    old_NT: Tensor
    """Log-probs under the policy that the step began with; NaN where that is the policy as it is now."""
    engine_NT: Tensor
    """Log-probs as the engine sampled them."""
    reference_NT: Tensor
    advantage_NT: Tensor
    value_NT: Tensor
    return_NT: Tensor


class Policy(Reader):
    """What learns: a policy with its loss, the model it started from, and a critic where advantages need one.

    With LoRA all are one network: the reference leaves the adapters out, the critic has its own, and the base that the start
    was trained from is the start with that training undone. Without, reference, critic and base are networks of their own.
    """

    def __init__(
        self,
        network: Any,
        objective: config.PPO,
        compute: torch.dtype,
        device: str = "cpu",
        path: TreePath | None = None,
        *,
        control_ids: Sequence[int] = (),
        reference: Any = None,
        critic: Any = None,
        base: Any = None,
    ) -> None:
        super().__init__(network, compute, device, path)
        self._masked = (min(control_ids), max(control_ids) + 1) if control_ids else (0, 0)
        self.objective = objective
        self.reference = reference
        self.critic = critic
        self.base = base
        """None: the reference, with the adapter ORIGIN where there is one."""
        self.value_head = nn.Linear((critic or network).config.hidden_size, 1) if objective.advantage == "gae" else None
        self._role = "policy"
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self, batch: Any, channels: Sequence[str] = (), num_tokens: float = 0.0, learns_policy: bool = True, kl: float = 0.0
    ) -> Loss | Tensor:
        """The loss of a PolicyBatch; without `num_tokens` the `channels` of a Batch, shape [C, N, T], without gradients."""
        if num_tokens:
            return self._loss(batch, num_tokens, learns_policy, kl)
        with torch.no_grad():
            found = self._channels(batch, channels)
        return torch.stack([found[name] for name in channels])

    def _channels(self, batch: Batch, wanted: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "policy" in wanted or "entropy" in wanted:
            logp, entropy, _ = self._policy(batch, entropy="entropy" in wanted)
            found |= {"policy": logp} | ({} if entropy is None else {"entropy": entropy})
        frozen = {"reference": self.reference, "base": self.base or self.reference}
        for role in frozen.keys() & set(wanted):
            network = self.network if frozen[role] is None else frozen[role]
            with self._acting(role), self.autocast():
                there = at_answers(self.hidden(batch, network), batch)
                found[role] = spread(target_logp(self._head(network), there, _targets(batch)), batch)
        if "value" in wanted:
            found["value"] = self.values(batch)
        return found

    def _loss(self, batch: PolicyBatch, num_tokens: float, learns_policy: bool, kl: float) -> Loss:
        o, tree = self.objective, batch.tree
        mask = tree.mask_NT
        logp, entropy, touched = self._policy(tree, entropy=o.entropy_bonus > 0)
        old = torch.where(batch.old_NT.isnan(), logp.detach(), batch.old_NT)
        weights = importance(old, batch.engine_NT, o.importance_cap) if o.importance_cap else None
        fit = policy_loss(
            logp, old, batch.advantage_NT, mask, clip=o.clip, dual_clip=o.dual_clip, importance_NT=weights, num_tokens=num_tokens
        )
        total, parts = fit.total, dict(fit.parts)
        if kl and o.kl.place == "loss":
            leash = kl_loss(logp, batch.reference_NT, mask, estimator=o.kl.estimator, num_tokens=num_tokens)
            total, parts = total + kl * leash.total, parts | leash.parts
        if entropy is not None:
            bonus = entropy_bonus(entropy, mask, num_tokens=num_tokens)
            total, parts = total + o.entropy_bonus * bonus.total, parts | bonus.parts
        gap = (old - batch.engine_NT).abs().nan_to_num() * mask
        parts["mismatch"] = gap.sum() / num_tokens
        if weights is not None:
            parts["importance"] = (weights * mask).sum() / num_tokens
        total = total * float(learns_policy) + 0.0 * touched
        if self.value_head is not None:
            fitted = value_loss(
                self.values(tree), batch.value_NT, batch.return_NT, mask, clip=o.critic.clip, num_tokens=num_tokens
            )
            total, parts = total + o.critic.weight * fitted.total, parts | fitted.parts
        return Loss(total, parts)

    def _policy(self, tree: Batch, *, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probs, the entropy if it is wanted, and a number that every parameter of an empty batch reaches."""
        with self._acting("policy"), self.autocast():
            hidden = self.hidden(tree)
            there = at_answers(hidden, tree)
            if not entropy:
                return spread(target_logp(self._head(self.network), there, _targets(tree)), tree), None, hidden.sum()
            logp, spread_out = logp_and_entropy(self._head(self.network), there, _targets(tree))
            return spread(logp, tree), spread(spread_out, tree), hidden.sum()

    def _head(self, network: Any) -> Head:
        return Head.of(network)._replace(temperature=self.objective.sampling.temperature, masked=self._masked)

    def values(self, batch: Batch) -> Tensor:
        """What the critic expects of each answer from each of its tokens on, in level units, [N, T]."""
        assert self.value_head is not None
        with self._acting(CRITIC), self.autocast():
            hidden = self.hidden(batch, self.critic)
        read = at_answers(hidden, batch).float()
        return spread(self.value_head(read)[:, 0], batch) + 0.0 * hidden.sum()

    @contextlib.contextmanager
    def _acting(self, role: str) -> Iterator[None]:
        """Let the one network act as policy, reference, base or critic."""
        before, self._role = self._role, role
        try:
            self._switch()
            yield
        finally:
            self._role = before
            self._switch()

    def _switch(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapter = {"policy": "default", "base": ORIGIN, CRITIC: CRITIC}.get(self._role)
        for layer in self.network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer._disable_adapters = adapter not in layer.lora_A
                layer._active_adapter = ["default" if layer._disable_adapters else adapter]
        rows = self.network.get_input_embeddings()
        if isinstance(rows, ControlRows):
            rows.frozen = self._role != "policy"

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """For activation checkpointing: what is computed again in the backward pass meets the adapters that it first met."""
        return contextlib.nullcontext(), self._acting(self._role)


def _targets(batch: Batch) -> Tensor:
    return batch.target_NT[batch.mask_NT.bool()]


def load_policy(
    folder: str,
    objective: config.PPO,
    settings: config.Optimization,
    control_ids: Sequence[int],
    dtype: str,
    device: str,
    origin: Origin | None = None,
) -> Policy:
    """The model that PPO starts from, ready to train. Raises ConfigError when it or the critic's model does not fit."""
    network, path = load_network(folder, settings, control_ids, dtype, device)
    reference = critic = base = None
    needs_critic = objective.advantage == "gae"
    if needs_critic and objective.critic.model:
        critic = _load_critic(objective.critic.model, network, settings, control_ids, dtype, device, path)
    if settings.lora is None:
        reference = copy.deepcopy(network).requires_grad_(False).eval()
        critic = critic or (copy.deepcopy(network) if needs_critic else None)
        base = load_network(origin.folder, settings, control_ids, dtype, device)[0] if origin else None
        base = base.requires_grad_(False).eval() if base else None
    else:
        if needs_critic and critic is None:
            add_lora(network, settings.lora, CRITIC)
        if origin:
            add_origin(network, settings.lora, origin.learned, origin.card)
    networks = {"reference": reference, "critic": critic, "base": base}
    policy = Policy(network, objective, getattr(torch, dtype), device, path, control_ids=control_ids, **networks)
    if settings.activation_checkpointing:
        again = {"use_reentrant": False, "context_fn": policy.checkpoint_contexts}
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
    return policy.to(device)


def _load_critic(
    folder: str, policy: Any, settings: config.Optimization, control_ids: Sequence[int], dtype: str, device: str, path: TreePath
) -> Any:
    """A reward model's body as a critic, its vocabulary widened by the policy's control tokens."""
    from transformers import AutoModelForCausalLM

    stored = torch.float32 if settings.lora is None else getattr(torch, dtype)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=stored, use_safetensors=True)
    own, wanted = network.get_input_embeddings().weight, policy.get_input_embeddings().weight
    first = min(control_ids, default=len(wanted))
    if own.shape[1] != wanted.shape[1] or not first <= len(own) <= len(wanted):
        raise ConfigError(
            f"critic.model={folder!r}: vocabulary and hidden size are {tuple(own.shape)}, the policy's {tuple(wanted.shape)}; "
            "choose a model of the policy's own family, or leave critic.model unset"
        )
    network.resize_token_embeddings(len(wanted), mean_resizing=False)
    with torch.no_grad():
        network.get_input_embeddings().weight[first:] = wanted[first:].to(own.dtype).cpu()
    network.to(device).eval()
    if choose_path(network, gpu=device == "cuda") != path:
        raise ConfigError(f"critic.model={folder!r} reads packed prompts in its own way; leave critic.model unset")
    if settings.lora is not None:
        network.requires_grad_(False)
        add_lora(network, settings.lora)
    return network.train()


def policy_groups(policy: Policy, settings: config.Train) -> list[dict[str, Any]]:
    """Optimizer groups: adapters, control rows at their share of the rate and without decay, and the critic at its own rate."""
    o = policy.objective
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    critic = [p for n, p in named if _of_critic(n)]
    rows = [p for n, p in named if n.endswith(".rows")]
    rest = [p for n, p in named if not _of_critic(n) and not n.endswith(".rows")]
    faster = settings.control_rate / settings.learning_rate
    groups = [{"params": rest, "lr": o.learning_rate, "weight_decay": settings.weight_decay}]
    if rows:
        groups.append({"params": rows, "lr": o.learning_rate * faster, "weight_decay": 0.0})
    if critic:
        groups.append({"params": critic, "lr": o.critic.learning_rate, "weight_decay": 0.0})
    return groups


def _of_critic(name: str) -> bool:
    return f".{CRITIC}." in f".{name}." or name.startswith("value_head.")

