"""PPO's losses: numbers by hand, where clipping stops gradients, padding of any content, parts that sum to the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ctrlray.objectives.losses import Loss
from ctrlray.objectives.ppo import entropy_bonus, kl_loss, policy_loss, value_loss

ONES = torch.ones(2, 3)
RATIO = torch.tensor([[1.5, 1.1, 0.5], [0.5, 2.0, 4.0]])
ADVANTAGE = torch.tensor([[1.0, 2.0, 1.0], [-1.0, -1.0, -1.0]])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -4.0, -2.5]])
# what each token earns under clip 0.2 and dual clip 3:
# min(1.5, 1.2) = 1.2 clipped;  1.1 x 2 = 2.2;  min(0.5, 0.8) = 0.5
# min(-0.5, -0.8) = -0.8 clipped;  min(-2, -1.2) = -2;  max(min(-4, -1.2), -3) = -3 clipped
CLIPPED = torch.tensor([[True, False, False], [True, False, True]])

Data = tuple[Tensor, Tensor, Tensor, Tensor]
LOSSES: dict[str, Callable[..., Loss]] = {
    "policy": lambda a, b, c, d, mask, n: policy_loss(a, b, c, mask, clip=0.2, dual_clip=3.0, importance_NT=d, num_tokens=n),
    "policy_plain": lambda a, b, c, d, mask, n: policy_loss(
        a, b, c, mask, clip=0.2, dual_clip=None, importance_NT=None, num_tokens=n
    ),
    "value": lambda a, b, c, d, mask, n: value_loss(a, b, c, mask, clip=0.2, num_tokens=n),
    "value_plain": lambda a, b, c, d, mask, n: value_loss(a, b, c, mask, clip=None, num_tokens=n),
    "k1": lambda a, b, c, d, mask, n: kl_loss(a, b, mask, estimator="k1", num_tokens=n),
    "k2": lambda a, b, c, d, mask, n: kl_loss(a, b, mask, estimator="k2", num_tokens=n),
    "k3": lambda a, b, c, d, mask, n: kl_loss(a, b, mask, estimator="k3", num_tokens=n),
    "entropy": lambda a, b, c, d, mask, n: entropy_bonus(a, mask, num_tokens=n),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
unhurried = settings(deadline=None)  # a busy machine may take long over torch's first calls


def policy(ratio: Tensor, advantage: Tensor = ADVANTAGE, mask: Tensor = ONES, **changes) -> tuple[Loss, Tensor]:
    """The loss at a ratio, and the log-probs that it was taken of."""
    logp = (OLD + ratio.log()).requires_grad_()
    known = {"clip": 0.2, "dual_clip": 3.0, "importance_NT": None, "num_tokens": 6.0} | changes
    return policy_loss(logp, OLD, advantage, mask, **known), logp


def batch(seed: int, rows: int = 4, width: int = 5) -> tuple[Data, Tensor]:
    """Four random tensors, close enough to each other that some tokens are clipped and some are not; a mask of any lengths."""
    torch.manual_seed(seed)
    base = -torch.rand(rows, width, dtype=torch.double) * 3
    near = base + torch.randn(rows, width, dtype=torch.double) * 0.4
    other = torch.randn(rows, width, dtype=torch.double)
    weight = torch.rand(rows, width, dtype=torch.double) * 2
    mask = (torch.arange(width) < torch.randint(0, width + 1, (rows, 1))).double()
    mask[0, 0] = 1
    return (near, base, other, weight), mask


def with_gradient(name: str, data: Data, mask: Tensor, num_tokens: float) -> tuple[Loss, Tensor]:
    first = data[0].clone().requires_grad_()
    loss = LOSSES[name](first, *data[1:], mask, num_tokens)
    loss.total.backward()
    return loss, first.grad


# the policy


def test_policy_loss_by_hand():
    loss, _ = policy(RATIO)
    # -(1.2 + 2.2 + 0.5 - 0.8 - 2 - 3) / 6
    assert loss.total.item() == pytest.approx(1.9 / 6, rel=1e-6)
    assert loss.parts["policy"].item() == loss.total.item()
    assert loss.parts["clip_fraction"].item() == pytest.approx(3 / 6)
    assert loss.parts["ratio"].item() == pytest.approx((1.5 + 1.1 + 0.5 + 0.5 + 2 + 4) / 6, rel=1e-6)
    assert loss.parts["ratio_square"].item() == pytest.approx((2.25 + 1.21 + 0.25 + 0.25 + 4 + 16) / 6, rel=1e-6)
    # mean of ratio - 1 - ln ratio: (9.6 - 6 - ln(1.5 1.1 0.5 0.5 2 4)) / 6
    assert loss.parts["approx_kl"].item() == pytest.approx((3.6 - math.log(3.3)) / 6, rel=1e-5)


def test_policy_loss_without_dual_clip():
    loss, _ = policy(RATIO, dual_clip=None)
    assert loss.total.item() == pytest.approx(2.9 / 6, rel=1e-6)  # the last token costs 4 instead of 3
    assert loss.parts["clip_fraction"].item() == pytest.approx(2 / 6)


def test_importance_weights_the_loss_alone():
    # 2 1.2 + 0.5 2.2 + 0.5 - 0.8 - 0.25 2 - 2 3 = -3.3
    weights = torch.tensor([[2.0, 0.5, 1.0], [1.0, 0.25, 2.0]])
    loss, logp = policy(RATIO, importance_NT=weights)
    assert loss.total.item() == pytest.approx(3.3 / 6, rel=1e-6)
    loss.total.backward()
    assert_close(logp.grad, -(RATIO * ADVANTAGE * weights / 6).masked_fill(CLIPPED, 0.0))
    plain, _ = policy(RATIO)
    assert {k: v for k, v in loss.parts.items() if k != "policy"} == {k: v for k, v in plain.parts.items() if k != "policy"}


def test_clipping_kills_the_gradient_of_clipped_tokens_only():
    loss, logp = policy(RATIO)
    loss.total.backward()
    assert (logp.grad[CLIPPED] == 0).all()
    assert_close(logp.grad, -(RATIO * ADVANTAGE / 6).masked_fill(CLIPPED, 0.0))  # d ratio / d logp = ratio


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.19, 1.0, True),
        (1.21, 1.0, False),
        (0.79, 1.0, True),
        (0.81, -1.0, True),
        (0.79, -1.0, False),
        (1.21, -1.0, True),
        (2.99, -1.0, True),
        (3.01, -1.0, False),
        (3.01, 0.0, False),
    ],
)
def test_where_gradients_stop(ratio, advantage, flows):
    loss, logp = policy(torch.full((2, 3), ratio), torch.full((2, 3), advantage))
    loss.total.backward()
    assert_close(logp.grad, torch.full((2, 3), -ratio * advantage / 6 * flows))
    # a token without advantage is not kept from anything
    assert loss.parts["clip_fraction"].item() == pytest.approx(0.0 if flows or advantage == 0 else 1.0)


def test_the_first_step_is_the_policy_gradient():
    loss, logp = policy(torch.ones(2, 3))
    loss.total.backward()
    assert_close(logp.grad, -ADVANTAGE / 6)
    assert loss.total.item() == pytest.approx(-ADVANTAGE.mean().item())
    spread = {k: v.item() for k, v in loss.parts.items() if k != "policy"}
    assert spread == {"clip_fraction": 0.0, "ratio": 1.0, "ratio_square": 1.0, "approx_kl": 0.0}


@unhurried
@given(st.floats(-200, 200), st.floats(-10, 10), st.floats(1.01, 10))
def test_bounds_of_what_a_token_earns(log_ratio, advantage, dual_clip):
    """Never more than (1 + clip) A, nor less than dual_clip x A for a negative A; positive ones know no dual clip."""
    one = torch.ones(1, 1, dtype=torch.double)
    known = {"clip": 0.2, "importance_NT": None, "num_tokens": 1.0}
    both = policy_loss(one * log_ratio, one * 0, one * advantage, one, dual_clip=dual_clip, **known)
    plain = policy_loss(one * log_ratio, one * 0, one * advantage, one, dual_clip=None, **known)
    earned = -both.total.item()
    if advantage < 0:
        assert dual_clip * advantage - 1e-9 <= earned <= 0.8 * advantage + 1e-9
        assert earned >= -plain.total.item()
    else:
        assert 0 <= earned <= 1.2 * advantage + 1e-9
        assert both.total.item() == plain.total.item()


@pytest.mark.parametrize("far", [1000.0, -1000.0])
def test_far_policies_do_not_overflow(far):
    logp = (OLD + far).requires_grad_()
    loss = policy_loss(logp, OLD, ADVANTAGE, ONES, clip=0.2, dual_clip=None, importance_NT=None, num_tokens=6)
    loss.total.backward()
    assert loss.total.isfinite() and logp.grad.isfinite().all() and all(v.isfinite() for v in loss.parts.values())
    assert loss.parts["ratio"].item() == pytest.approx(math.exp(10 if far > 0 else -10), rel=1e-4)
    assert loss.parts["approx_kl"].item() == pytest.approx(math.exp(10) - 11 if far > 0 else 9 + math.exp(-10), rel=1e-4)


def test_approx_kl_is_unbiased_for_the_policy_that_sampled():
    """Expected over every token of a vocabulary, weighted by the old policy: KL(old || new)."""
    torch.manual_seed(0)
    old, new = torch.randn(2, 1, 6, dtype=torch.double).log_softmax(-1)
    known = {"clip": 0.2, "dual_clip": None, "importance_NT": None, "num_tokens": 1.0}
    expected = sum(
        old[0, v].exp() * policy_loss(new[:, [v]], old[:, [v]], old[:, [v]], torch.ones(1, 1), **known).parts["approx_kl"]
        for v in range(6)
    )
    assert_close(expected, (old.exp() * (old - new)).sum())


# the critic


def test_value_loss_by_hand():
    values, returns = torch.tensor([[1.5, 1.5], [1.1, 0.5]], requires_grad=True), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    # old values 1, cut to [0.8, 1.2]: max(0.25, 0.64) clipped;  max(2.25, 1.44);  0.81;  max(0.25, 0.64) clipped
    loss = value_loss(values, torch.ones(2, 2), returns, torch.ones(2, 2), clip=0.2, num_tokens=4)
    assert loss.total.item() == pytest.approx(0.5 * (0.64 + 2.25 + 0.81 + 0.64) / 4, rel=1e-6)
    assert loss.parts["value"].item() == loss.total.item()
    assert loss.parts["value_clip_fraction"].item() == pytest.approx(2 / 4)
    loss.total.backward()
    assert_close(values.grad, torch.tensor([[0.0, 1.5 / 4], [-0.9 / 4, 0.0]]))  # (value - return) / tokens


def test_value_loss_without_clip_is_half_the_squared_error():
    values, returns = torch.tensor([[1.5, 1.5], [1.1, 0.5]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    loss = value_loss(values, torch.ones(2, 2), returns, torch.ones(2, 2), clip=None, num_tokens=4)
    assert loss.total.item() == pytest.approx(0.5 * (0.25 + 2.25 + 0.81 + 0.25) / 4, rel=1e-6)
    assert loss.parts["value_clip_fraction"].item() == 0


@unhurried
@given(st.integers(0, 9999))
def test_values_within_the_clip_are_not_called_clipped(seed):
    """Not by a rounding either, such as that of old + (values - old) where the two have different signs."""
    torch.manual_seed(seed)
    values, old, returns = torch.rand(3, 4, 8) * 0.19 - 0.095
    loss = value_loss(values, old, returns, torch.ones(4, 8), clip=0.2, num_tokens=32)
    assert loss.parts["value_clip_fraction"].item() == 0


# the leash


def test_kl_loss_by_hand():
    # twice and half the reference's probability: k3 = ln 2 - 1/2 and 1 - ln 2; k2 = (ln 2)^2 / 2 twice; k1 = ±ln 2
    logp, reference = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    for estimator, mean in [("k1", 0.0), ("k2", math.log(2) ** 2 / 2), ("k3", 0.25)]:
        loss = kl_loss(logp, reference, torch.ones(1, 2), estimator=estimator, num_tokens=2)
        assert loss.total.item() == pytest.approx(mean, abs=1e-7)
        assert loss.parts["kl_loss"].item() == loss.total.item()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradients_of_kl_estimators(estimator):
    """Over every token of a vocabulary, weighted by the policy: of nothing, KL(policy || reference), KL(reference || policy)."""
    torch.manual_seed(1)
    logits = torch.randn(1, 6, dtype=torch.double, requires_grad=True)
    reference = torch.randn(1, 6, dtype=torch.double).log_softmax(-1)
    logp = logits.log_softmax(-1)
    at_tokens = logp.detach().requires_grad_()
    kl_loss(at_tokens, reference, torch.ones(1, 6), estimator=estimator, num_tokens=1).total.backward()
    (found,) = torch.autograd.grad(logp, logits, grad_outputs=logp.detach().exp() * at_tokens.grad, retain_graph=True)
    forward, backward = (logp.exp() * (logp - reference)).sum(), (reference.exp() * (reference - logp)).sum()
    (expected,) = torch.autograd.grad({"k1": 0.0 * forward, "k2": forward, "k3": backward}[estimator], logits)
    assert_close(found, expected)


def test_kl_gradients_end_at_the_limit():
    logp = torch.tensor([[0.0, -1.0, -20.0]], requires_grad=True)
    kl_loss(logp, torch.tensor([[-20.0, -2.0, 0.0]]), torch.ones(1, 3), estimator="k2", num_tokens=1).total.backward()
    assert logp.grad.tolist() == [[0.0, 1.0, 0.0]]


# entropy


def test_entropy_bonus_by_hand():
    entropy = torch.tensor([[1.0, 2.0], [4.0, 9.0]], requires_grad=True)
    loss = entropy_bonus(entropy, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), num_tokens=3)
    assert loss.total.item() == pytest.approx(-7 / 3) and loss.parts["entropy"].item() == pytest.approx(7 / 3)
    loss.total.backward()
    assert_close(entropy.grad, torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]) / 3)  # descending raises entropy


# all of them


@every_loss
@unhurried
@given(seed=st.integers(0, 9999), cuts=st.sets(st.integers(1, 3)))
def test_parts_of_a_batch_sum_to_the_whole(name, seed, cuts):
    """However the rows are cut into micro batches, totals, parts and gradients are the one big batch's."""
    data, mask = batch(seed)
    num_tokens = mask.sum().item()
    whole, gradient = with_gradient(name, data, mask, num_tokens)
    edges = [0, *sorted(cuts), 4]
    pieces = [
        with_gradient(name, tuple(t[a:b] for t in data), mask[a:b], num_tokens)
        for a, b in pairwise(edges)
    ]
    assert_close(sum(loss.total for loss, _ in pieces), whole.total)
    for part, value in whole.parts.items():
        assert_close(sum(loss.parts[part] for loss, _ in pieces), value, check_dtype=False)
    assert_close(torch.cat([g for _, g in pieces]), gradient)


@every_loss
@unhurried
@given(seed=st.integers(0, 9999))
def test_order_of_rows_does_not_matter(name, seed):
    data, mask = batch(seed)
    whole, gradient = with_gradient(name, data, mask, 7.0)
    order = torch.randperm(4)
    shuffled, shuffled_gradient = with_gradient(name, tuple(t[order] for t in data), mask[order], 7.0)
    assert_close(shuffled.total, whole.total)
    assert_close(shuffled.parts, whole.parts)
    assert_close(shuffled_gradient, gradient[order])


@every_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_may_hold_anything(name, garbage):
    """In any one tensor or in all: neither values nor gradients notice, and padding's gradient is 0."""
    data, mask = batch(seed=5)
    cut = mask.bool()
    clean, gradient = with_gradient(name, data, mask, 5.0)
    for spoiled, kind in product(({0}, {1}, {2}, {3}, {0, 1, 2, 3}), (torch.double, torch.bool, torch.int64)):
        dirty = tuple(t.masked_fill(~cut, garbage) if i in spoiled else t for i, t in enumerate(data))
        loss, dirty_gradient = with_gradient(name, dirty, mask.to(kind), 5.0)
        assert_close(loss.total, clean.total, rtol=0.0, atol=0.0)
        assert_close(loss.parts, clean.parts, rtol=0.0, atol=0.0)
        assert_close(dirty_gradient, gradient, rtol=0.0, atol=0.0)
    assert (gradient[~cut] == 0).all() and (gradient[cut] != 0).any()


@every_loss
def test_gradients_match_finite_differences(name):
    data, mask = batch(seed=3)
    first = data[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, *data[1:], mask, 5.0).total, (first,), eps=1e-7)


@every_loss
def test_only_the_total_carries_gradients(name):
    data, mask = batch(seed=3)
    loss = LOSSES[name](data[0].requires_grad_(), *data[1:], mask, 5.0)
    assert loss.total.requires_grad and loss.total.shape == ()
    assert not any(part.requires_grad or part.shape for part in loss.parts.values())


@every_loss
def test_a_micro_batch_without_tokens_adds_nothing(name):
    data, mask = batch(seed=3)
    loss, gradient = with_gradient(name, data, torch.zeros_like(mask), 5.0)
    assert loss.total.item() == 0 and all(v.item() == 0 for v in loss.parts.values()) and (gradient == 0).all()
    empty = LOSSES[name](*(t[:0] for t in data), mask[:0], 5.0)
    assert empty.total.item() == 0 and all(v.item() == 0 for v in empty.parts.values())
