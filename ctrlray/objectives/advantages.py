"""From scores to advantages. Shape key: N answers, T response tokens, A attributes, G groups. Log-probs in nats.

`mask_NT` is 1 where a token counts: the first tokens of a row, as answers are padded on the right. What other tensors hold on
padding, NaN included, does not matter. Statistics (`rloo`, `grpo`, `whiten`, `explained_variance`) are of the rows given, so
they take a whole step's rollouts, not a micro batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

LOG_RATIO_LIMIT = 10.0
"""Nats at which log ratios are cut before they are exponentiated."""


def counted(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The values where the mask is 1, else 0. Unlike a product with the mask, it stops NaN and inf, also in gradients."""
    return torch.where(mask_NT.bool(), values_NT, 0.0)


def level_reward(units_NA: Tensor, requested_NA: Tensor, weights_A: Tensor) -> Tensor:
    """Minus the weighted distance from the requested levels, shape [N], in level units; 0 is a perfect answer."""
    return -((units_NA - requested_NA).abs() * weights_A).sum(-1)


def shaped_reward(reward_N: Tensor, finished_N: Tensor, *, clip: float | None, missing_eos_penalty: float) -> Tensor:
    """Rewards cut to ±clip; then unfinished answers pay the penalty, so that it also tells apart what the clip made equal."""
    if clip is not None:
        reward_N = reward_N.clamp(-clip, clip)
    return torch.where(finished_N.bool(), reward_N, reward_N - missing_eos_penalty)


def terminal_rewards(reward_N: Tensor, mask_NT: Tensor) -> Tensor:
    """An answer's reward at its last token, shape [N, T]; zeros elsewhere. An answer without tokens gets none."""
    position_T = torch.arange(mask_NT.shape[1], device=mask_NT.device)
    last_NT = position_T == mask_NT.sum(-1, keepdim=True) - 1
    return torch.where(last_NT, reward_N[:, None], 0.0)


def kl_estimate(logp_NT: Tensor, reference_NT: Tensor, estimator: Estimator, *, limit: float = LOG_RATIO_LIMIT) -> Tensor:
    """Per token estimates of KL(policy || reference) from tokens that the policy sampled, shape [N, T].

    With delta = reference - logp (John Schulman, "Approximating KL Divergence", 2020): k1 = -delta is unbiased and of either
    sign, k2 = delta^2 / 2 is biased by little and never negative, k3 = exp(delta) - 1 - delta is both unbiased and, but for
    rounding, never negative. delta is cut to ±limit, so that a token costs at most exp(limit); beyond it gradients are 0.
    """
    delta_NT = (reference_NT - logp_NT).clamp(-limit, limit)
    if estimator == "k1":
        return -delta_NT
    if estimator == "k2":
        return delta_NT.square() / 2
    # exp(delta) - 1 would lose all digits of k3 at the small deltas of a policy that has hardly moved
    return torch.expm1(delta_NT) - delta_NT


def gae(rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantages (arXiv 1506.02438 eq. 16) and the returns, advantage + value, that a critic learns; both [N, T].

    The value after the last token is 0, also for an answer cut off there: what it lacks is the penalty's business. Both are 0
    on padding.
    """
    rewards_NT, values_NT = counted(rewards_NT, mask_NT), counted(values_NT, mask_NT)
    next_value_N = advantage_N = values_NT.new_zeros(values_NT.shape[0])
    # on padding reward, value and so advantage are 0: what the last token needs to find behind it
    advantages_NT = torch.empty_like(values_NT)
    for t in reversed(range(values_NT.shape[1])):
        surprise_N = rewards_NT[:, t] + gamma * next_value_N - values_NT[:, t]
        advantage_N = surprise_N + gamma * lam * advantage_N
        next_value_N = values_NT[:, t]
        advantages_NT[:, t] = advantage_N
    return advantages_NT, advantages_NT + values_NT


def rloo(reward_N: Tensor, group_N: Tensor) -> Tensor:
    """Reward minus the mean reward of the group's other answers (arXiv 2402.14740), shape [N]; 0 in a group of one.

    `group_N` numbers each answer's group: any integers, in any order.
    """
    centred_N, others_N, _ = _centred(reward_N, group_N)
    # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
    return (centred_N * (others_N + 1) / others_N.clamp_min(1)).to(reward_N.dtype)


def grpo(reward_N: Tensor, group_N: Tensor, *, eps: float = 1e-6) -> Tensor:
    """(reward - mean) / (std + eps) within a group (arXiv 2402.03300 section 4.1.2), shape [N]; 0 in a group of one.

    The paper does not say which standard deviation; this is the sample's, over n - 1, as in TRL. The population's would make
    advantages sqrt(n / (n - 1)) times as large. `group_N` as in `rloo`.
    """
    centred_N, others_N, index_N = _centred(reward_N, group_N)
    variance_N = _group_sum(centred_N.square(), index_N) / others_N.clamp_min(1)
    return (centred_N / (variance_N.sqrt() + eps)).to(reward_N.dtype)


def whiten(values_NT: Tensor, mask_NT: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values scaled to variance 1 over all tokens that count, and shifted to mean 0 or else left at their mean; [N, T].

    Over n, with 1e-8 added to the variance, as in the code of arXiv 1909.08593.
    """
    num_tokens = mask_NT.sum().clamp_min(1)
    mean = counted(values_NT, mask_NT).sum() / num_tokens
    centred_NT = counted(values_NT - mean, mask_NT)
    scaled_NT = centred_NT * (centred_NT.square().sum() / num_tokens + 1e-8).rsqrt()
    return scaled_NT if shift_mean else counted(scaled_NT + mean, mask_NT)


def adapted(coefficient: float, kl_per_response: float, num_responses: int, *, target: float, horizon: int) -> float:
    """The KL coefficient after an update on `num_responses` (Ziegler et al., arXiv 1909.08593 section 2.2).

    The relative error kl / target - 1, cut to ±0.2, moves the coefficient by the factor 1 + error x num_responses / horizon;
    the paper writes K_beta for that quotient. From 5 horizons on the factor could be 0 or negative: a ValueError.
    """
    if num_responses >= 5 * horizon:
        raise ValueError(f"horizon={horizon} is too short for {num_responses} responses per update; set {num_responses} or more")
    error = min(max(kl_per_response / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_responses / horizon)


def importance(old_logp_NT: Tensor, engine_logp_NT: Tensor, cap: float) -> Tensor:
    """Truncated weights min(p_old / p_engine, cap), without gradient, shape [N, T].

    Tokens were sampled by the engine, whose numerics differ from the trainer's; the weights make up for it at a bounded
    variance (truncated importance sampling: Ionides 2008; for this mismatch: Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training"). Where the engine reported NaN, the two count as agreeing.
    """
    engine_logp_NT = torch.where(engine_logp_NT.isnan(), old_logp_NT, engine_logp_NT)
    return (old_logp_NT - engine_logp_NT).detach().exp().clamp_max(cap)


def explained_variance(values_NT: Tensor, returns_NT: Tensor, mask_NT: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over tokens that count: 1 is a perfect critic, 0 as good as a constant.

    NaN where returns do not vary, as then there is nothing to explain.
    """
    values, returns = values_NT[mask_NT.bool()].double(), returns_NT[mask_NT.bool()].double()
    if returns.numel() == 0 or bool((returns == returns[0]).all()):
        return math.nan
    return 1 - float((returns - values).var() / returns.var())


def _centred(reward_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per answer: its distance from the group's mean, the number of others in the group, the group's index.

    In float64: in float32 the mean of equal rewards may be off by a rounding, which `grpo` would blow up.
    """
    _, index_N = torch.unique(group_N, return_inverse=True)
    reward_N = reward_N.double()
    size_N = _group_sum(torch.ones_like(reward_N), index_N)
    return reward_N - _group_sum(reward_N, index_N) / size_N, size_N - 1, index_N


def _group_sum(values_N: Tensor, index_N: Tensor) -> Tensor:
    """The sum over an answer's group, for each answer; `index_N` numbers the groups from 0."""
    # at most N groups; not one-hot products, in which one NaN reward would reach all groups
    return torch.zeros_like(values_N).index_add(0, index_N, values_N)[index_N]
