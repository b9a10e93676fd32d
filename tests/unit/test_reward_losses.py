"""Objectives of reward models: numbers by hand, signs of gradients, masks, and parts that sum to the whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrlray.objectives.reward import bradley_terry, regression

ZERO = torch.zeros(2)


def test_bradley_terry_by_hand():
    # gaps ln 3 and 0: -log(3/4) and -log(1/2); mean (ln 4/3 + ln 2) / 2 = ln(8/3) / 2. One right, one tie: 3/4.
    chosen, rejected = torch.tensor([math.log(3), 1.0]), torch.tensor([0.0, 1.0])
    loss = bradley_terry(chosen, rejected, ZERO, num_pairs=2)
    assert loss.total.item() == pytest.approx(math.log(8 / 3) / 2, rel=1e-6)
    assert loss.parts["accuracy"].item() == pytest.approx(0.75)


def test_margin_by_hand():
    # gap 2 ln 3 less margin ln 3 leaves ln 3: -log(3/4) = ln 4/3
    loss = bradley_terry(torch.tensor([math.log(9)]), ZERO[:1], torch.tensor([math.log(3)]), num_pairs=1)
    assert loss.total.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert loss.parts["accuracy"].item() == 1.0


def test_bradley_terry_raises_chosen_and_lowers_rejected():
    chosen, rejected = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([0.1, 2.0], requires_grad=True)
    bradley_terry(chosen, rejected, ZERO, num_pairs=2).total.backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)
    assert chosen.grad[1].abs() > chosen.grad[0].abs()  # the pair that is wrong pulls harder


def test_bradley_terry_stays_finite():
    assert bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]), ZERO[:1], num_pairs=1).total.item() == pytest.approx(2e4)


def test_regression_by_hand():
    # errors 1, 2 and -1 count, the fourth has no label: (1 + 4 + 1) / 3 = 2
    score, rating = torch.tensor([[1.0, 2.0], [3.0, 7.0]]), torch.tensor([[0.0, 0.0], [4.0, math.nan]])
    rated = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert regression(score, rating, rated, num_ratings=3).total.item() == pytest.approx(2.0)


def test_a_missing_rating_has_no_gradient():
    score = torch.tensor([[1.0, 2.0]], requires_grad=True)
    regression(score, torch.tensor([[3.0, math.nan]]), torch.tensor([[1.0, 0.0]]), num_ratings=1).total.backward()
    assert score.grad.tolist() == [[-4.0, 0.0]]  # d (s - r)^2 / ds = 2 (1 - 3)


@given(st.integers(2, 7), st.integers(0, 99))
def test_parts_of_a_batch_sum_to_the_whole(rows, seed):
    torch.manual_seed(seed)
    chosen, rejected, margin = torch.randn(3, rows)
    cut = rows // 2
    whole = bradley_terry(chosen, rejected, margin, num_pairs=rows)
    parts = [bradley_terry(chosen[s], rejected[s], margin[s], num_pairs=rows) for s in (slice(cut), slice(cut, None))]
    assert sum(p.total.item() for p in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(p.parts["accuracy"].item() for p in parts) == pytest.approx(whole.parts["accuracy"].item(), rel=1e-5)
    score, rating = torch.randn(2, rows, 3)
    rated = (torch.rand(rows, 3) < 0.7).float()
    rated[0, 0] = 1
    total = rated.sum().item()
    whole = regression(score, rating, rated, num_ratings=total)
    parts = [regression(score[s], rating[s], rated[s], num_ratings=total) for s in (slice(cut), slice(cut, None))]
    assert sum(p.total.item() for p in parts) == pytest.approx(whole.total.item(), rel=1e-5)
