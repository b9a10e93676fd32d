"""CLM and ExMATE. Shape key: B sequences, T response tokens. Log-probs in nats; a mask is 1 where a token counts.

Totals over the whole batch (`num_tokens`, `num_wrong`) come as arguments, so that a loss summed over micro batches and ranks
equals the loss of the one big batch. Multiply by the world size where a data-parallel engine averages over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """A scalar to descend, and its detached parts."""

    total: Tensor
    parts: dict[str, Tensor]


def sequence_mean(logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean log-prob per sequence, shape [B]; 0 for a sequence without tokens."""
    return (logp_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp_min(1)


def clm(logp_BT: Tensor, mask_BT: Tensor, weight_B: Tensor, *, num_tokens: float) -> Loss:
    """Weighted mean negative log-likelihood of response tokens given prompt and code.

    `num_tokens` is the sum over the whole batch of weight x tokens. Every token of the batch counts alike, whichever
    sequence it is in (the usual choice for CLM; the paper does not say).
    """
    nll = -(logp_BT * mask_BT * weight_B[:, None]).sum() / num_tokens
    return Loss(nll, {"nll": nll.detach()})


def exmate(
    logp_BT: Tensor,
    mask_BT: Tensor,
    weight_B: Tensor,
    wrong_logp_BT: Tensor,
    wrong_mask_BT: Tensor,
    *,
    weight: float,
    num_tokens: float,
    num_wrong: float,
    reduction: str = "sequence",
) -> Loss:
    """CLM + weight x exp(mean log-prob under a wrong code) (ExMATE, arXiv 2212.10515 eq. 5; arXiv 2404.01295).

    The penalty lies in (0, 1] and fades as wrong pairs become unlikely. `sequence`: its mean over the `num_wrong` wrong pairs
    of the whole batch. `batch`: the authors' code, exp of the mean log-prob of all wrong tokens of this micro batch; that
    value is weighted by the micro batch's share of `num_wrong`, and depends on how the batch is cut.
    """
    fit = clm(logp_BT, mask_BT, weight_B, num_tokens=num_tokens)
    if wrong_logp_BT.shape[0] == 0:
        leak = torch.zeros((), dtype=logp_BT.dtype)
    elif reduction == "sequence":
        leak = sequence_mean(wrong_logp_BT, wrong_mask_BT).exp().sum() / num_wrong
    else:
        mean = (wrong_logp_BT * wrong_mask_BT).sum() / wrong_mask_BT.sum().clamp_min(1)
        leak = mean.exp() * wrong_logp_BT.shape[0] / num_wrong
    return Loss(fit.total + weight * leak, fit.parts | {"leak": leak.detach()})
