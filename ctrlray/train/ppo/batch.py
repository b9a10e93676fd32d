"""A step's rollouts as tensors: rewards, advantages, and what the step reports. Shape key: N answers, T response tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ctrlray import config, schema
from ctrlray.objectives import advantages as adv
from ctrlray.train.batches import TrainExample

Channels = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rollouts:
    """The rollouts that a step trains on, in a fixed order, answers padded on the right."""

    examples: list[TrainExample]
    prompts: list[str]
    plain_ids: list[tuple[int, ...]]
    group: Tensor
    mask: Tensor
    engine_logp: Tensor
    finished: Tensor
    requested: Tensor
    """[N, A] levels."""
    units: Tensor
    """[N, A] continuous levels."""
    weights: Tensor
    """[A], of an attribute's distance in the reward."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], names: Sequence[str], weights: Mapping[str, float]) -> Rollouts:
        """From rows of the rollouts table; those with an error are left out."""
        used = sorted((r for r in rows if not r["error"]), key=lambda r: str(r["rollout_id"]))
        width = max((len(r["token_ids"]) for r in used), default=0)
        mask, engine = torch.zeros(len(used), width), torch.zeros(len(used), width)
        for i, row in enumerate(used):
            size = len(row["token_ids"])
            mask[i, :size] = 1
            engine[i, :size] = torch.tensor(row["logprobs"] or [math.nan] * size)
        return cls(
            [TrainExample((tuple(r["prompt_ids"]),), (tuple(r["token_ids"]),), 1.0, r["prompt_id"]) for r in used],
            [r["prompt_id"] for r in used],
            [tuple(r["plain_ids"]) for r in used],
            torch.tensor([r["group"] for r in used], dtype=torch.long),
            mask,
            engine,
            torch.tensor([r["finish_reason"] in schema.FINISHED for r in used], dtype=torch.bool),
            torch.tensor([[float(r[f"requested_{n}"]) for n in names] for r in used]),
            torch.tensor([[r[f"units_{n}"] for n in names] for r in used]),
            torch.tensor([weights.get(n, 1.0) for n in names]),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def plain(self) -> Rollouts:
        """The same answers to the prompts without their codes."""
        bare = [replace(e, prompts=(ids,)) for e, ids in zip(self.examples, self.plain_ids, strict=True)]
        return replace(self, examples=bare)

    def spread(self, found: Sequence[tuple[Tensor, Tensor]], num_channels: int) -> Tensor:
        """Channels of micro batches, as (rollout index [M], values [C, M, t]), as [C, N, T]."""
        out = torch.zeros(num_channels, *self.mask.shape)
        for index_M, values_CMt in found:
            width = min(values_CMt.shape[2], out.shape[2])
            out[:, index_M, :width] = values_CMt[..., :width]
        return out * self.mask


def channels(objective: config.PPO, kl_coefficient: float, *, on_policy: bool, measured: bool) -> tuple[str, ...]:
    """What a step must know of its rollouts before it trains: no pass that nothing needs.

    On policy, one update for a step, the old log-probs are those of the update itself.
    """
    leashed = kl_coefficient > 0
    policy = measured or not on_policy or leashed
    reference = measured or leashed
    wanted = {"policy": policy, "entropy": measured, "reference": reference, "value": objective.advantage == "gae"}
    return tuple(name for name, asked in wanted.items() if asked)


def targets(objective: config.PPO, rollouts: Rollouts, scored: Channels, kl_coefficient: float) -> dict[str, Tensor]:
    """Everything that the loss reads of each token beside the tree, [N, T] each, and the rewards [N]."""
    o, mask = objective, rollouts.mask
    reward_N = rewards(o, rollouts)
    nan, zero = torch.full_like(mask, math.nan), torch.zeros_like(mask)
    charged = zero
    if kl_coefficient > 0 and o.kl.place == "reward":
        charged = kl_coefficient * adv.kl_estimate(scored["policy"], scored["reference"], o.kl.estimator) * mask
    value_NT, return_NT = scored.get("value", zero), zero
    if o.advantage == "gae":
        tokens_NT = adv.terminal_rewards(reward_N, mask) - charged
        advantage_NT, return_NT = adv.gae(tokens_NT, value_NT, mask, gamma=o.gamma, lam=o.gae_lambda)
    else:
        compare = adv.rloo if o.advantage == "rloo" else adv.grpo
        advantage_NT = compare(reward_N - charged.sum(-1), rollouts.group)[:, None] * mask
    if o.whiten and o.advantage != "grpo":
        advantage_NT = adv.whiten(advantage_NT, mask)
    return {
        "old_NT": scored.get("policy", nan),
        "engine_NT": rollouts.engine_logp,
        "reference_NT": scored.get("reference", zero),
        "advantage_NT": advantage_NT,
        "value_NT": value_NT,
        "return_NT": return_NT,
    }


def rewards(objective: config.PPO, rollouts: Rollouts) -> Tensor:
    """Reward of each answer in level units, [N]."""
    reached = adv.level_reward(rollouts.units, rollouts.requested, rollouts.weights)
    return adv.shaped_reward(
        reached, rollouts.finished, clip=objective.reward_clip, missing_eos_penalty=objective.missing_eos_penalty
    )


def facts(
    objective: config.PPO, names: Sequence[str], rollouts: Rollouts, scored: Channels, found: Mapping[str, Tensor]
) -> dict[str, float]:
    """What a step reports of its rollouts."""
    made = {
        "reward": float(rewards(objective, rollouts).mean()),
        "length": float(rollouts.mask.sum(-1).mean()),
        "truncated": float((~rollouts.finished).float().mean()),
    }
    for a, name in enumerate(names):
        made[f"error_{name}"] = float((rollouts.units[:, a] - rollouts.requested[:, a]).abs().mean())
        for level in sorted(set(rollouts.requested[:, a].tolist())):
            made[f"achieved_{name}_{level:g}"] = float(rollouts.units[rollouts.requested[:, a] == level, a].mean())
    if "policy" in scored and "reference" in scored:
        made["kl"] = kl_mean(scored["policy"], scored["reference"], rollouts.mask)
    if "entropy" in scored:
        made["entropy"] = float(scored["entropy"].sum() / rollouts.mask.sum())
    if "value" in scored:
        made["explained_variance"] = adv.explained_variance(found["value_NT"], found["return_NT"], rollouts.mask)
    return made


def kl_mean(policy_NT: Tensor, reference_NT: Tensor, mask_NT: Tensor) -> float:
    """Nats per response: mean over answers of the sum of log ratios (k1), which is unbiased for the KL of whole answers."""
    return float(((policy_NT - reference_NT) * mask_NT).sum(-1).mean())


def next_coefficient(kl: config.KL, coefficient: float, measured: float, num_responses: int) -> float:
    """The KL coefficient of the next step."""
    if kl.target is None:
        return coefficient
    return adv.adapted(coefficient, measured, num_responses, target=kl.target, horizon=kl.horizon)
