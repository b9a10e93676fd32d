"""Log-probs of answers' tokens out of hidden states, a few tokens at a time: all logits of a batch never exist at once.

Shape key: N answer tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctrlray.control import MASKED_BY
from ctrlray.errors import ConfigError
from ctrlray.memory import LOGITS_AT_ONCE

_ROWS = 16


class Head(NamedTuple):
    """An output layer as transformers' causal models compute it: `cap * tanh(scale * (W h + b) / cap) / temperature`."""

    layer: nn.Linear
    scale: float
    cap: float | None
    temperature: float = 1.0
    masked: tuple[int, int] = (0, 0)
    """Ids from the first up to the second are never sampled: the control tokens, whose logits engines lower by as much."""

    @classmethod
    def of(cls, network: Any) -> Head:
        """The head of a network, with what its family does to logits (Gemma caps, Cohere and Granite scale them)."""
        settings = network.config
        scale = getattr(settings, "logit_scale", None) or 1.0
        scale /= getattr(settings, "logits_scaling", None) or 1.0
        return cls(network.get_output_embeddings(), scale, getattr(settings, "final_logit_softcapping", None))

    @torch.no_grad()
    def check(self, network: Any) -> None:
        """Raise ConfigError unless these are the network's own logits: families are many, and a wrong one trains in silence."""
        ids = torch.arange(1, 9, device=self.layer.weight.device)[None]
        own = network(input_ids=ids, use_cache=False).logits.float()
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        mine = self.shaped(self.layer(hidden.to(self.layer.weight.dtype))).float()
        if own.shape != mine.shape or not torch.allclose(own, mine, rtol=0.05, atol=0.05 * float(own.abs().max())):
            raise ConfigError(
                f"model: a {type(network).__name__} makes its logits in a way that training does not know; choose a model whose "
                "logits are its output layer's, scaled or capped (Llama, Qwen, Gemma, Mistral, Granite, Cohere and alike)"
            )

    def shaped(self, raw: Tensor) -> Tensor:
        """What the family does to raw logits, which may be changed in place, then the mask and temperature of sampling."""
        scaled = raw * self.scale if self.scale != 1.0 else raw
        capped = torch.tanh(scaled / self.cap) * self.cap if self.cap else scaled
        if self.masked[1]:
            capped[..., slice(*self.masked)] -= MASKED_BY
        return capped / self.temperature if self.temperature != 1.0 else capped


def target_logp(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """Log-probs of target tokens in nats, float32 [N].

    A frozen head's gradient is taken in the forward pass, where the logits are: the Jacobian of a token's log-prob is one
    row of size D, and a loss may combine log-probs as it likes. A head that trains computes its chunks again instead.
    """
    if any(p.requires_grad for p in head.layer.parameters()):
        rows = max(16, LOGITS_AT_ONCE // head.layer.out_features)
        pieces = zip(torch.split(hidden_ND, rows), torch.split(target_N, rows), strict=True)
        return torch.cat([checkpoint(_plain_logp, head, h, t, use_reentrant=False) for h, t in pieces])
    with whole(head.layer):
        found: Tensor = _FrozenHead.apply(hidden_ND.to(head.layer.weight.dtype), target_N, head)  # type: ignore[no-untyped-call]
    return found


def logp_and_entropy(head: Head, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens, and the entropy of what they were chosen from; nats, float32 [N] each."""
    rows = max(_ROWS, LOGITS_AT_ONCE // head.layer.out_features)
    pieces = zip(torch.split(hidden_ND, rows), torch.split(target_N, rows), strict=True)
    found = [checkpoint(_plain_both, head, h, t, use_reentrant=False) for h, t in pieces]
    return torch.cat([logp for logp, _ in found]), torch.cat([entropy for _, entropy in found])


def _plain_both(head: Head, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    logp_NV = torch.log_softmax(head.shaped(head.layer(hidden_ND)).float(), -1)
    return logp_NV.gather(1, target_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def _plain_logp(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(head.shaped(head.layer(hidden_ND)).float(), target_N, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """d logp_i / d h_i = scale / temperature * (c_t W_t - sum_v p_v c_v W_v), c = 1 - (z / cap)^2 the slope of the cap at z."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:
        wanted = hidden_ND.requires_grad
        weight, bias = head.layer.weight, head.layer.bias
        rows = max(_ROWS, LOGITS_AT_ONCE // len(weight) // _ROWS * _ROWS)
        logp_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_ND.device)
        jacobian_ND = torch.empty_like(hidden_ND) if wanted else None
        for start in range(0, len(target_N), rows):
            piece = slice(start, start + rows)
            target = target_N[piece, None]
            logits = head.shaped(nn.functional.linear(_filled(hidden_ND[piece]), weight, bias))[: len(target)]
            chances = torch.softmax(logits, -1, dtype=torch.float32)
            top, likeliest = chances.max(-1, keepdim=True)  # at least 1 / V, so its log is exact where a rare target's is not
            total = logits.gather(1, likeliest).float() - top.log()
            logp_N[piece] = (logits.gather(1, target).float() - total)[:, 0]
            if jacobian_ND is not None:
                slope = 1 - (logits.float() * head.temperature / head.cap) ** 2 if head.cap else None
                towards = weight[target[:, 0]]
                if slope is not None:
                    chances, towards = chances * slope, towards * slope.gather(1, target).to(weight.dtype)
                torch.sub(towards, (_filled(chances.to(weight.dtype)) @ weight)[: len(target)], out=jacobian_ND[piece])
        if jacobian_ND is not None:
            ctx.save_for_backward(jacobian_ND)
        ctx.scale = head.scale / head.temperature
        return logp_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (jacobian_ND,) = ctx.saved_tensors
        return jacobian_ND * (grads[0] * ctx.scale).to(jacobian_ND.dtype)[:, None], None, None


def _filled(rows: Tensor) -> Tensor:
    """Zero rows up to a multiple, so that products come in few shapes: a CPU keeps a kernel for each."""
    missing = -len(rows) % _ROWS
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


@contextlib.contextmanager
def whole(layer: nn.Module) -> Iterator[None]:
    """The layer's parameters unsharded: ZeRO-3 keeps a part of each on every rank."""
    sharded = [p for p in layer.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
