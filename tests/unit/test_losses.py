from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrlray.objectives.losses import clm, exmate, sequence_mean

LOG = torch.tensor([[0.5, 0.25, 0.9], [0.125, 0.5, 0.5]]).log()
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # 2 and 1 tokens; the rest is padding
ONE = torch.ones(2)


def test_clm_by_hand():
    # (ln 2 + ln 4 + ln 8) / 3 tokens = 6 ln 2 / 3 = 2 ln 2
    assert clm(LOG, MASK, ONE, num_tokens=3).total.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    # weights 1 and 2: (3 ln 2 + 2 * 3 ln 2) / (2 + 2 * 1) = 9/4 ln 2
    assert clm(LOG, MASK, torch.tensor([1.0, 2.0]), num_tokens=4).total.item() == pytest.approx(2.25 * math.log(2), rel=1e-6)


def test_exmate_sequence_by_hand():
    wrong = torch.tensor([[0.25, 0.25], [0.5, 0.9]]).log()
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    # leaks exp(ln 1/4) = 1/4 and 1/2, mean 3/8; 2 ln 2 + 0.5 * 3/8
    loss = exmate(LOG, MASK, ONE, wrong, mask, weight=0.5, num_tokens=3, num_wrong=2)
    assert loss.total.item() == pytest.approx(2 * math.log(2) + 0.1875, rel=1e-6)
    assert loss.parts["leak"].item() == pytest.approx(0.375, rel=1e-6)


def test_exmate_batch_by_hand():
    wrong = torch.tensor([[0.25, 0.25], [0.5, 0.9]]).log()
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    # mean over all 3 wrong tokens: -(2 + 2 + 1) ln 2 / 3; exp = 2^(-5/3)
    loss = exmate(LOG, MASK, ONE, wrong, mask, weight=1.0, num_tokens=3, num_wrong=2, reduction="batch")
    assert loss.parts["leak"].item() == pytest.approx(2 ** (-5 / 3), rel=1e-6)


def test_zero_weight_is_clm():
    loss = exmate(LOG, MASK, ONE, LOG, MASK, weight=0.0, num_tokens=3, num_wrong=2)
    assert loss.total.item() == clm(LOG, MASK, ONE, num_tokens=3).total.item()


def test_gradient_raises_right_and_lowers_wrong():
    right, wrong = LOG.clone().requires_grad_(), LOG.clone().requires_grad_()
    exmate(right, MASK, ONE, wrong, MASK, weight=1.0, num_tokens=3, num_wrong=2).total.backward()
    assert (right.grad[MASK.bool()] < 0).all() and (wrong.grad[MASK.bool()] > 0).all()
    assert (right.grad[~MASK.bool()] == 0).all() and (wrong.grad[~MASK.bool()] == 0).all()


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_parts_of_a_batch_sum_to_the_whole(rows, tokens, seed):
    """Two ranks or micro batches with the batch's totals give exactly the loss of one big batch."""
    torch.manual_seed(seed)
    logp, wrong = -torch.rand(rows, tokens), -torch.rand(rows, tokens)
    mask = torch.ones(rows, tokens)
    mask[0, tokens // 2 :] = 0
    weight = torch.rand(rows) + 0.5
    totals = {"num_tokens": float((mask * weight[:, None]).sum()), "num_wrong": float(rows), "weight": 0.7}
    whole = exmate(logp, mask, weight, wrong, mask, **totals).total
    cut = rows // 2
    halves = [exmate(logp[s], mask[s], weight[s], wrong[s], mask[s], **totals).total for s in (slice(cut), slice(cut, None))]
    assert torch.allclose(whole, sum(halves), atol=1e-6)


def test_padding_changes_nothing():
    wide = torch.cat([LOG, torch.full((2, 4), -9.0)], 1), torch.cat([MASK, torch.zeros(2, 4)], 1)
    assert torch.equal(sequence_mean(*wide), sequence_mean(LOG, MASK))
