"""A step's rollouts as tensors: worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ctrlray import config
from ctrlray.objectives import advantages as adv
from ctrlray.train.ppo import batch as b


def row(name, group, tokens, requested, units, finish="stop", error=""):
    return {
        "rollout_id": name, "prompt_id": f"p{group}", "group": group, "plain_ids": [1, 2], "prompt_ids": [1, 2, 9],
        "token_ids": list(range(tokens)), "logprobs": [-0.5] * tokens, "finish_reason": finish, "error": error,
        "requested_a": requested, "units_a": units,
    }  # fmt: skip


ROWS = [row("d", 1, 2, 1, 1.5), row("a", 0, 3, 3, 2.0), row("b", 0, 1, 3, 3.0), row("c", 1, 2, 1, 3.0, finish="length")]
"""In the order of their ids: errors 1, 0, 2 and 0.5 levels; c was cut off."""


def rollouts(**weights):
    return b.Rollouts.of([*ROWS, row("e", 1, 2, 1, math.nan, error="score")], ["a"], weights)


def test_used_rollouts_come_in_the_order_of_their_ids():
    found = rollouts()
    assert len(found) == 4 and found.prompts == ["p0", "p0", "p1", "p1"]
    assert found.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert found.finished.tolist() == [True, True, False, True]
    assert found.engine_logp[1].tolist() == [-0.5, 0, 0]
    assert found.plain().examples[0].prompts == ((1, 2),) and found.examples[0].prompts == ((1, 2, 9),)


def test_rewards_by_hand():
    """Minus the distance, and one level less for the answer that was cut off."""
    assert b.rewards(config.PPO(), rollouts()).tolist() == [-1.0, 0.0, -3.0, -0.5]
    assert b.rewards(config.PPO(missing_eos_penalty=0, reward_clip=1.5), rollouts()).tolist() == [-1.0, 0.0, -1.5, -0.5]
    assert b.rewards(config.PPO(), rollouts(a=2.0)).tolist() == [-2.0, 0.0, -5.0, -1.0]


def test_leave_one_out_targets_by_hand():
    """Against the other of the pair: -1 and 1, -2.5 and 2.5, on every token."""
    found = b.targets(config.PPO(whiten=False), rollouts(), {}, 0.0)
    assert found["advantage_NT"].tolist() == [[-1, -1, -1], [1, 0, 0], [-2.5, -2.5, 0], [2.5, 2.5, 0]]
    assert found["old_NT"].isnan().all()
    assert found["engine_NT"][0].tolist() == [-0.5] * 3


def test_kl_in_the_reward_is_charged_before_the_comparison():
    """k1 of 0.1 a token, coefficient 2: rewards -1 - 0.6, 0 - 0.2, -3 - 0.4, -0.5 - 0.4."""
    ppo = config.PPO(whiten=False)
    scored = {"policy": torch.full((4, 3), -0.4), "reference": torch.full((4, 3), -0.5)}
    found = b.targets(ppo, rollouts(), scored, 2.0)
    assert found["advantage_NT"][:, 0].tolist() == pytest.approx([-1.4, 1.4, -2.5, 2.5])
    loss = b.targets(ppo.model_copy(update={"kl": config.KL(estimator="k2", place="loss")}), rollouts(), scored, 2.0)
    assert loss["advantage_NT"][:, 0].tolist() == pytest.approx([-1.0, 1.0, -2.5, 2.5])


@pytest.mark.parametrize("estimator, place", [("k2", "reward"), ("k3", "reward"), ("k1", "loss")])
def test_a_leash_that_does_not_pull_is_refused(estimator, place):
    with pytest.raises(ValueError, match="does not pull"):
        config.KL(estimator=estimator, place=place)


@pytest.mark.parametrize("estimator, pull", [("k1", 1.0), ("k2", 0.0), ("k3", 0.0)])
def test_near_the_reference_only_k1_pulls_as_a_reward(estimator, pull):
    """E[k grad logp] over all tokens of a small vocabulary, as a share of the gradient of KL(policy || reference)."""
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.double).log()
    logits = (reference + 0.01 * torch.tensor([1.0, -2.0, 0.5, 0.5])).requires_grad_()
    policy = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    charged = adv.kl_estimate(policy.detach(), reference, estimator)
    (found,) = torch.autograd.grad((policy.detach().exp() * charged * policy).sum(), logits)
    assert float(found @ wanted / wanted.square().sum()) == pytest.approx(pull, abs=0.03)


def test_targets_of_a_critic_by_hand():
    """gamma = lambda = 1: an advantage is the reward still to come minus the value; its return is that reward."""
    ppo = config.PPO(advantage="gae", whiten=False, gae_lambda=1.0)
    value = torch.tensor([[0.5, 0.5, 0.5], [1.0, 9, 9], [0, 1.0, 9], [0, 0, 9]])
    found = b.targets(ppo, rollouts(), {"value": value}, 0.0)
    assert found["return_NT"].tolist() == [[-1, -1, -1], [0, 0, 0], [-3, -3, 0], [-0.5, -0.5, 0]]
    assert found["advantage_NT"].tolist() == [[-1.5, -1.5, -1.5], [-1, 0, 0], [-3, -4, 0], [-0.5, -0.5, 0]]


def test_whitening_spares_grpo():
    white = b.targets(config.PPO(), rollouts(), {}, 0.0)["advantage_NT"]
    counted = white[rollouts().mask.bool()]
    assert counted.mean().item() == pytest.approx(0, abs=1e-6) and counted.var(correction=0).item() == pytest.approx(1, rel=0.2)
    scaled = b.targets(config.PPO(advantage="grpo"), rollouts(), {}, 0.0)["advantage_NT"]
    assert scaled[0, 0].item() == pytest.approx(-scaled[1, 0].item())


@pytest.mark.parametrize(
    "settings, given, wanted",
    [
        ({}, {"kl": 0.0, "on_policy": True, "measured": False}, ()),
        ({}, {"kl": 0.0, "on_policy": False, "measured": False}, ("policy",)),
        ({}, {"kl": 0.1, "on_policy": True, "measured": False}, ("policy", "reference")),
        ({}, {"kl": 0.0, "on_policy": True, "measured": True}, ("policy", "entropy", "reference")),
        ({"advantage": "gae"}, {"kl": 0.0, "on_policy": True, "measured": False}, ("value",)),
    ],
)
def test_no_pass_that_nothing_needs(settings, given, wanted):
    kl = given.pop("kl")
    assert b.channels(config.PPO(**settings), kl, **given) == wanted


def test_facts_by_hand():
    scored = {"policy": torch.full((4, 3), -0.4), "reference": torch.full((4, 3), -0.5), "entropy": rollouts().mask * 2}
    found = b.facts(config.PPO(), ["a"], rollouts(), scored, {})
    assert found["reward"] == -4.5 / 4 and found["truncated"] == 0.25 and found["length"] == 2.0
    assert found["error_a"] == (1 + 0 + 2 + 0.5) / 4
    assert found["achieved_a_3"] == 2.5 and found["achieved_a_1"] == 2.25
    assert found["kl"] == pytest.approx(0.1 * 2) and found["entropy"] == 2.0


def test_channels_of_micro_batches_go_back_to_their_rollouts():
    found = rollouts()
    first = (torch.tensor([2, 0]), torch.tensor([[[1.0, 2.0, 7.0, 7.0], [3.0, 4.0, 5.0, 7.0]]]))
    second = (torch.tensor([1]), torch.tensor([[[6.0]]]))
    assert found.spread([first, second], 1)[0].tolist() == [[3, 4, 5], [6, 0, 0], [1, 2, 0], [0, 0, 0]]


def test_an_adaptive_coefficient_moves_towards_its_target():
    kl = config.KL(target=5.0, horizon=100)
    assert b.next_coefficient(kl, 0.1, 50.0, 10) > 0.1 > b.next_coefficient(kl, 0.1, 0.1, 10)
    assert b.next_coefficient(config.KL(), 0.1, 50.0, 10) == 0.1
