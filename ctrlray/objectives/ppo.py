"""Losses of reinforcement learning. Shape key: N answers, T response tokens. Log-probs in nats.

`mask_NT` is 1 where a token counts; padding may hold anything, NaN included, and gets gradient 0. `num_tokens` counts the
whole batch's tokens, so that totals and parts, summed over micro batches and ranks, equal those of the one big batch. Only
the first argument is differentiated; the others are data from the rollout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlray.objectives.advantages import LOG_RATIO_LIMIT, Estimator, counted, kl_estimate
from ctrlray.objectives.losses import Loss


def policy_loss(
    logp_NT: Tensor,
    old_logp_NT: Tensor,
    advantage_NT: Tensor,
    mask_NT: Tensor,
    *,
    clip: float,
    dual_clip: float | None,
    importance_NT: Tensor | None,
    num_tokens: float,
) -> Loss:
    """Minus PPO's clipped surrogate min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = exp(logp - old_logp).

    arXiv 1707.06347 eq. 7. A negative advantage is multiplied by at most `dual_clip` (arXiv 1912.09729 eq. 5). Each token is
    weighted by `importance_NT` where given. Every token of the batch counts alike, whichever answer it is in.

    Parts: `policy`, the loss; `clip_fraction`, the share of tokens that one of the clips keeps from the gradient; means of
    `ratio` and of its square `ratio_square`; `approx_kl`, k3 of KL(old || new), as the old policy sampled. The parts but
    `policy` are without importance weights.
    """
    logp_NT, old_logp_NT = counted(logp_NT, mask_NT), counted(old_logp_NT, mask_NT)
    advantage_NT = counted(advantage_NT, mask_NT)
    ratio_NT = (logp_NT - old_logp_NT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain_NT = ratio_NT * advantage_NT
    gain_NT = torch.minimum(plain_NT, ratio_NT.clamp(1 - clip, 1 + clip) * advantage_NT)
    if dual_clip is not None:
        gain_NT = torch.where(advantage_NT < 0, torch.maximum(gain_NT, dual_clip * advantage_NT), gain_NT)
    clipped_NT = gain_NT != plain_NT
    if importance_NT is not None:
        gain_NT = gain_NT * counted(importance_NT, mask_NT)
    loss = -gain_NT.sum() / num_tokens
    counted_ratio_NT = counted(ratio_NT.detach(), mask_NT)
    return Loss(
        loss,
        {
            "policy": loss.detach(),
            "clip_fraction": clipped_NT.sum() / num_tokens,
            "ratio": counted_ratio_NT.sum() / num_tokens,
            "ratio_square": counted_ratio_NT.square().sum() / num_tokens,
            "approx_kl": kl_estimate(old_logp_NT, logp_NT.detach(), "k3").sum() / num_tokens,
        },
    )


def value_loss(
    values_NT: Tensor,
    old_values_NT: Tensor,
    returns_NT: Tensor,
    mask_NT: Tensor,
    *,
    clip: float | None,
    num_tokens: float,
) -> Loss:
    """Half the mean squared error of values; with `clip` the larger of it and that of values cut to old ± clip.

    The cut is in no paper of PPO; it is in OpenAI's `baselines` (ppo2) and in the code of arXiv 1909.08593. A value that went
    further than `clip` towards its return earns nothing more. `value_clip_fraction` is the share of those tokens.
    """
    values_NT, old_values_NT = counted(values_NT, mask_NT), counted(old_values_NT, mask_NT)
    returns_NT = counted(returns_NT, mask_NT)
    plain_NT = error_NT = (values_NT - returns_NT).square()
    if clip is not None:
        cut_NT = values_NT.clamp(old_values_NT - clip, old_values_NT + clip)
        error_NT = torch.maximum(plain_NT, (cut_NT - returns_NT).square())
    loss = 0.5 * error_NT.sum() / num_tokens
    return Loss(loss, {"value": loss.detach(), "value_clip_fraction": (error_NT > plain_NT).sum() / num_tokens})


def kl_loss(logp_NT: Tensor, reference_NT: Tensor, mask_NT: Tensor, *, estimator: Estimator, num_tokens: float) -> Loss:
    """Mean of `kl_estimate` over tokens, as a loss.

    Its gradient is that of the estimate at the sampled tokens, not of the sampling. With r = policy / reference and
    s = grad logp, for tokens of this very policy, whose E[s] is 0, in expectation over a token given those before it:

    - k1: s, of mean 0. It pulls nowhere and only adds noise.
    - k2: log(r) s, the gradient of KL(policy || reference), although k2 itself is biased.
    - k3: (1 - 1/r) s, the gradient of KL(reference || policy), the other direction, although k3 itself is unbiased for this
      one. 1 - 1/r is log(r) to first order: the two pull alike near the reference. Where the policy has become likelier it
      pulls with at most 1, where unlikelier exponentially.

    None tells a token of the KL that it leads later tokens into; as a reward the KL does. Beyond `kl_estimate`'s limit
    gradients are 0.
    """
    estimate_NT = kl_estimate(counted(logp_NT, mask_NT), counted(reference_NT, mask_NT), estimator)
    loss = estimate_NT.sum() / num_tokens
    return Loss(loss, {"kl_loss": loss.detach()})


def entropy_bonus(entropy_NT: Tensor, mask_NT: Tensor, *, num_tokens: float) -> Loss:
    """Minus the mean entropy of tokens' distributions, in nats; the part `entropy` is the mean itself."""
    mean = counted(entropy_NT, mask_NT).sum() / num_tokens
    return Loss(-mean, {"entropy": mean.detach()})
