"""From scores to advantages: numbers by hand, the papers' definitions written out, masks, order of rows, exact expectations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ctrlray.objectives.advantages import (
    adapted,
    counted,
    explained_variance,
    gae,
    grpo,
    importance,
    kl_estimate,
    level_reward,
    rloo,
    shaped_reward,
    terminal_rewards,
    whiten,
)

NAN, INF = math.nan, math.inf
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # 3, 1 and 0 tokens
seeds = given(st.integers(0, 9999))
unhurried = settings(deadline=None)  # a busy machine may take long over torch's first calls


def ragged(rows: int, width: int) -> torch.Tensor:
    """A mask of random lengths; some rows are empty, some full."""
    return (torch.arange(width) < torch.randint(0, width + 1, (rows, 1))).double()


def spoil(values: torch.Tensor, mask: torch.Tensor, garbage: float) -> torch.Tensor:
    return values.masked_fill(~mask.bool(), garbage)


# rewards


def test_level_reward_by_hand():
    # |1 - 3| 1 + |2 - 1.5| 2 = 3;  |4 - 4| 1 + |0 - 2| 2 = 4
    units, requested = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[3.0, 1.5], [4.0, 2.0]])
    assert level_reward(units, requested, torch.tensor([1.0, 2.0])).tolist() == [-3.0, -4.0]


def test_shaped_reward_clips_before_the_penalty():
    # -9 to -2, 5 to 2, 1 stays; then the second and third pay 0.5: 1.5 and 0.5
    reward, finished = torch.tensor([-9.0, 5.0, 1.0]), torch.tensor([True, False, False])
    assert shaped_reward(reward, finished, clip=2.0, missing_eos_penalty=0.5).tolist() == [-2.0, 1.5, 0.5]
    assert shaped_reward(reward, finished, clip=None, missing_eos_penalty=0.5).tolist() == [-9.0, 4.5, 0.5]
    assert shaped_reward(reward, finished.float(), clip=None, missing_eos_penalty=0.5).tolist() == [-9.0, 4.5, 0.5]
    # an unfinished answer at the clip is still worse than a finished one there
    assert shaped_reward(torch.tensor([-9.0]), torch.tensor([False]), clip=2.0, missing_eos_penalty=0.5).item() == -2.5


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int64])
def test_terminal_rewards_sit_on_the_last_token(kind):
    expected = [[0.0, 0.0, 7.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert terminal_rewards(torch.tensor([7.0, 5.0, NAN]), MASK.to(kind)).tolist() == expected  # no tokens: no reward
    assert terminal_rewards(torch.tensor([3.0]), torch.ones(1, 2).to(kind)).tolist() == [[0.0, 3.0]]
    assert terminal_rewards(torch.tensor([3.0]), torch.ones(1, 0).to(kind)).shape == (1, 0)


# divergence


def test_kl_estimates_by_hand():
    half, quarter = torch.tensor([[0.5]], dtype=torch.double).log(), torch.tensor([[0.25]], dtype=torch.double).log()
    two = math.log(2)
    # the policy has twice the reference's probability: delta = -ln 2, exp(delta) = 1/2
    assert kl_estimate(half, quarter, "k1").item() == pytest.approx(two, rel=1e-12)
    assert kl_estimate(half, quarter, "k2").item() == pytest.approx(two**2 / 2, rel=1e-12)
    assert kl_estimate(half, quarter, "k3").item() == pytest.approx(0.5 - 1 + two, rel=1e-12)
    # and half of it: delta = ln 2, exp(delta) = 2
    assert kl_estimate(quarter, half, "k1").item() == pytest.approx(-two, rel=1e-12)
    assert kl_estimate(quarter, half, "k2").item() == pytest.approx(two**2 / 2, rel=1e-12)
    assert kl_estimate(quarter, half, "k3").item() == pytest.approx(2 - 1 - two, rel=1e-12)


@unhurried
@seeds
def test_kl_estimates_against_exact_kl(seed):
    """Expectations over all tokens of a small vocabulary: k1 and k3 are unbiased, each k3 is at least 0."""
    torch.manual_seed(seed)
    p, q = torch.randn(2, 1, 5, dtype=torch.double).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum().item()
    for estimator in ("k1", "k3"):
        assert (p.exp() * kl_estimate(p, q, estimator)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (kl_estimate(p, q, "k3") >= 0).all() and (kl_estimate(p, q, "k2") >= 0).all()


@unhurried
@seeds
def test_k2_is_close_for_close_policies(seed):
    torch.manual_seed(seed)
    logits = torch.randn(1, 5, dtype=torch.double)
    p, q = logits.log_softmax(-1), (logits + 0.01 * torch.randn(1, 5, dtype=torch.double)).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * kl_estimate(p, q, "k2")).sum().item() == pytest.approx(exact, rel=0.05)


def test_k3_keeps_its_digits_at_small_steps():
    # k3 = delta^2 / 2 + delta^3 / 6 + ...: 5e-9 at 1e-4, below float32's step of 6e-8 at exp(delta) = 1
    moved = torch.tensor([[1e-4, -1e-4]])
    assert_close(kl_estimate(torch.zeros(1, 2), moved, "k3"), torch.full((1, 2), 5e-9), rtol=0.01, atol=0.0)


def test_log_ratios_are_limited():
    policy, reference = torch.tensor([[0.0, -100.0, -3.0]]), torch.tensor([[-100.0, 0.0, 0.0]])
    assert kl_estimate(policy, reference, "k1").tolist() == [[10.0, -10.0, -3.0]]
    assert kl_estimate(policy, reference, "k2").tolist() == [[50.0, 50.0, 4.5]]
    assert_close(kl_estimate(policy, reference, "k3"), torch.tensor([[9 + math.exp(-10), math.exp(10) - 11, math.exp(3) - 4]]))
    assert kl_estimate(policy, reference, "k1", limit=2.0).tolist() == [[2.0, -2.0, -2.0]]
    assert kl_estimate(torch.zeros(1, 1), torch.full((1, 1), -INF), "k3").isfinite().all()


# generalized advantages


def test_gae_by_hand():
    # surprises, from the last: 2 - 1.5 = 0.5;  0 + 0.5 1.5 - 1 = -0.25;  1 + 0.5 1 - 0.5 = 1
    # advantages with gamma lam = 1/8: 0.5;  -0.25 + 0.5/8 = -0.1875;  1 - 0.1875/8 = 0.9765625
    rewards = torch.tensor([[1.0, 0.0, 2.0, NAN], [1.0, NAN, INF, NAN], [NAN, NAN, NAN, INF]])
    values = torch.tensor([[0.5, 1.0, 1.5, INF], [0.25, NAN, 9.0, NAN], [NAN, 1.0, NAN, NAN]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, lam=0.25)
    assert advantages.tolist() == [[0.9765625, -0.1875, 0.5, 0.0], [0.75, 0.0, 0.0, 0.0], [0.0] * 4]
    assert returns.tolist() == [[1.4765625, 0.8125, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4]


def test_gae_of_no_tokens():
    advantages, returns = gae(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0), gamma=0.5, lam=0.25)
    assert advantages.shape == returns.shape == (2, 0)


@unhurried
@given(st.integers(0, 9999), st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_gae_is_the_sum_of_discounted_surprises(seed, gamma, lam):
    """Equation 16 written out, with values of 0 behind the last token, whatever padding holds."""
    torch.manual_seed(seed)
    mask = ragged(4, 6)
    rewards, values = torch.randn(2, 4, 6, dtype=torch.double)
    advantages, returns = gae(spoil(rewards, mask, NAN), spoil(values, mask, INF), mask.bool(), gamma=gamma, lam=lam)
    expected = torch.zeros(4, 6, dtype=torch.double)
    for row, length in enumerate(mask.sum(-1).int().tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        surprise = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[row, t] = sum((gamma * lam) ** k * surprise[t + k] for k in range(length - t))
    assert_close(advantages, expected)
    assert_close(returns, expected + values * mask)


@unhurried
@seeds
def test_gae_with_lambda_one_is_discounted_return_minus_value(seed):
    torch.manual_seed(seed)
    mask = ragged(3, 5)
    rewards, values = torch.randn(2, 3, 5, dtype=torch.double)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    later = torch.ones(5, 5, dtype=torch.double).triu()
    weight = later * 0.9 ** (torch.arange(5) - torch.arange(5)[:, None]).double()  # 0.9^(k - t) for k >= t
    discounted = (rewards * mask) @ weight.T * mask
    assert_close(returns, discounted)
    assert_close(advantages, discounted - values * mask)


# groups


def test_rloo_by_hand():
    # group 7 holds 1, 2, 6: 1 - (2 + 6)/2 = -3, 2 - (1 + 6)/2 = -1.5, 6 - (1 + 2)/2 = 4.5; group 3 holds 4, 0; 5 is alone
    reward, group = torch.tensor([1.0, 4.0, 2.0, 9.0, 6.0, 0.0]), torch.tensor([7, 3, 7, 5, 7, 3])
    assert rloo(reward, group).tolist() == [-3.0, 4.0, -1.5, 0.0, 4.5, -4.0]


def test_grpo_by_hand():
    # group 7: mean 3, distances -2, -1, 3, variance (4 + 1 + 9)/2 = 7; group 3: mean 2, distances ±2, variance (4 + 4)/1 = 8
    reward, group = torch.tensor([1.0, 4.0, 2.0, 9.0, 6.0, 0.0]), torch.tensor([7, 3, 7, 5, 7, 3])
    a, b = math.sqrt(7) + 0.5, math.sqrt(8) + 0.5
    assert_close(grpo(reward, group, eps=0.5), torch.tensor([-2 / a, 2 / b, -1 / a, 0.0, 3 / a, -2 / b]))
    # rewards 2e-6 apart: 1e-6 / (sqrt(2) 1e-6 + 1e-6)
    tiny = torch.tensor([0.0, 2e-6], dtype=torch.double)
    assert grpo(tiny, torch.tensor([0, 0]))[1].item() == pytest.approx(1 / (math.sqrt(2) + 1), rel=1e-9)


@pytest.mark.parametrize("advantage", [rloo, grpo])
@unhurried
@given(st.floats(-5, 5, width=32), st.integers(2, 9))
def test_equal_rewards_have_no_advantage(advantage, reward, size):
    """Exactly: a mean off by one rounding would be divided by next to nothing."""
    assert advantage(torch.full((size,), reward), torch.zeros(size, dtype=torch.int64)).tolist() == [0.0] * size


@pytest.mark.parametrize("advantage", [rloo, grpo])
@unhurried
@given(st.integers(0, 9999), st.lists(st.integers(-2, 3), min_size=1, max_size=9))
def test_groups_in_any_order(advantage, seed, groups):
    """Rows may be shuffled and groups renamed; a group's advantages add up to 0 and do not see other groups."""
    torch.manual_seed(seed)
    group = torch.tensor(groups)
    reward = torch.randn(len(groups))
    result = advantage(reward, group)
    assert result.dtype == reward.dtype
    order = torch.randperm(len(groups))
    assert_close(advantage(reward[order], 100 - 7 * group[order]), result[order])
    for member in group.unique():
        mine = group == member
        assert result[mine].sum().item() == pytest.approx(0, abs=1e-5)
        assert_close(advantage(torch.where(mine, reward, NAN), group)[mine], result[mine])


@unhurried
@seeds
def test_grpo_scales_a_group_to_variance_one(seed):
    torch.manual_seed(seed)
    result = grpo(torch.randn(6, dtype=torch.double) * 40 + 3, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert_close(result.view(2, 3).var(-1), torch.ones(2, dtype=torch.double), rtol=1e-4, atol=0.0)


# statistics over tokens


def test_counted_stops_nan_of_padding_only():
    values = torch.tensor([[1.0, NAN, INF]], requires_grad=True)
    kept = counted(values, torch.tensor([[1, 0, 0]]))
    kept.square().sum().backward()
    assert kept.tolist() == [[1.0, 0.0, 0.0]] and values.grad.tolist() == [[2.0, 0.0, 0.0]]
    # where a token counts, the network has diverged, and nothing should hide it
    assert counted(values, torch.tensor([[1, 1, 0]])).isnan().tolist() == [[False, True, False]]


def test_whiten_by_hand():
    # 1, 3 and 5 count: mean 3, variance (4 + 0 + 4)/3
    values, mask = torch.tensor([[1.0, 3.0, NAN], [5.0, INF, 7.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    one = 2 / math.sqrt(8 / 3)
    assert_close(whiten(values, mask), torch.tensor([[-one, 0.0, 0.0], [one, 0.0, 0.0]]))
    assert_close(whiten(values, mask, shift_mean=False), torch.tensor([[3 - one, 3.0, 0.0], [3 + one, 0.0, 0.0]]))


@unhurried
@given(st.integers(0, 9999), st.sampled_from([0.1, 1.0, 1e3]), st.floats(-5, 5))
def test_whitened_tokens_have_mean_zero_and_variance_one(seed, scale, shift):
    torch.manual_seed(seed)
    mask = ragged(4, 6)
    mask[0, :3] = 1
    values = torch.randn(4, 6, dtype=torch.double) * scale + shift
    result = whiten(spoil(values, mask, NAN), mask)
    tokens = result[mask.bool()]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-9)
    assert tokens.var(correction=0).item() == pytest.approx(1, rel=2e-3)
    assert (result[~mask.bool()] == 0).all()
    kept = whiten(spoil(values, mask, NAN), mask.bool(), shift_mean=False)
    assert_close(kept[mask.bool()], tokens + values[mask.bool()].mean())
    assert (kept[~mask.bool()] == 0).all()


def test_whiten_of_nothing_to_scale():
    assert whiten(torch.full((2, 3), NAN), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert whiten(torch.full((1, 2), 0.5), torch.ones(1, 2)).tolist() == [[0.0, 0.0]]
    # variance 1e-8 beside the 1e-8 that is added: 1e-4 / sqrt(2e-8)
    close = torch.tensor([[-1e-4, 1e-4]], dtype=torch.double)
    assert whiten(close, torch.ones(1, 2))[0, 1].item() == pytest.approx(math.sqrt(0.5), rel=1e-9)


def test_explained_variance_by_hand():
    # residuals 0, 0, -1: variance 1/3 - 1/9 = 2/9; returns 1, 2, 3: variance 2/3; 1 - 1/3
    returns, values = torch.tensor([[1.0, 2.0], [3.0, NAN]]), torch.tensor([[1.0, 2.0], [4.0, INF]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert explained_variance(values, returns, mask) == pytest.approx(2 / 3, rel=1e-12)
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1)  # a constant error is not variance
    assert explained_variance(torch.ones(2, 2), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)  # 1 - Var(2 returns) / Var(returns)


def test_explained_variance_without_variance():
    values, ones = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.double), torch.ones(1, 3)
    assert math.isnan(explained_variance(values, torch.full((1, 3), 0.1, dtype=torch.double), ones))
    assert math.isnan(explained_variance(values, values, torch.tensor([[1.0, 0.0, 0.0]])))
    assert math.isnan(explained_variance(values, values, torch.zeros(1, 3)))


# controller and weights


def test_adapted_by_hand():
    # error 5.5/5 - 1 = 0.1, times 100/1000: 1.01;  above 6 it is cut to 0.2: 1.02;  below 4 to -0.2: 0.98
    for kl, factor in [(5.5, 1.01), (5.0, 1.0), (4.5, 0.99), (50.0, 1.02), (0.0, 0.98), (-3.0, 0.98)]:
        assert adapted(0.3, kl, 100, target=5.0, horizon=1000) == pytest.approx(0.3 * factor, rel=1e-12)


@unhurried
@given(st.floats(1e-4, 10), st.floats(0, 100), st.floats(0.1, 20), st.integers(1, 400), st.integers(100, 9000))
def test_controller_steers_towards_its_target(coefficient, kl, target, responses, horizon):
    after = adapted(coefficient, kl, responses, target=target, horizon=horizon)
    assert after > 0
    assert after >= coefficient if kl > target else after <= coefficient
    if abs(kl - target) > 0.01 * target:
        assert after != coefficient


def test_a_coefficient_never_turns_negative():
    assert adapted(1.0, 0.0, 49, target=5.0, horizon=10) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="horizon=10 is too short for 50 responses per update; set 50 or more"):
        adapted(1.0, 0.0, 50, target=5.0, horizon=10)


def test_importance_by_hand():
    # 1/2 by 1/4 is 2, cut to 1.5;  1/4 by 1/2;  unknown;  an engine that rules the token out;  far beyond what exp can hold
    old = torch.tensor([[math.log(0.5), math.log(0.25), -3.0, -3.0, -1.0]], requires_grad=True)
    engine = torch.tensor([[math.log(0.25), math.log(0.5), NAN, -INF, -1000.0]])
    weights = importance(old, engine, 1.5)
    assert_close(weights, torch.tensor([[1.5, 0.5, 1.0, 1.5, 1.5]]))
    assert not weights.requires_grad
