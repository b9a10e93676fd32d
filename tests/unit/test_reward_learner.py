"""Labels as batches: what is dealt to whom, what a batch holds, and that shards add up to the whole."""

from __future__ import annotations

import random

import pytest
import torch

from ctrlray import schema
from ctrlray.rewards.learner import LabelTable, RewardNetwork, label_loss
from ctrlray.tables import Storage, from_rows

NAN = float("nan")


def row(split="train", ids=(5,), rejected=(), head=-1, margin=0.0, ratings=()):
    return {
        "split": split, "token_ids": list(ids), "rejected_ids": list(rejected), "head": head, "margin": margin,
        "ratings": list(ratings),
    }  # fmt: skip


def table(folder, rows, attributes=2):
    out = Storage(str(folder))
    out.write_table(from_rows(rows, schema.labels()), "labels")
    return LabelTable(out, pad_id=9, num_attributes=attributes)


def test_a_batch_by_hand(tmp_path):
    rows = [
        row(ids=[1, 2, 3], rejected=[1, 2], head=1, margin=0.5),
        row(ids=[4], ratings=[2.0, NAN]),
        row("valid", ids=[7], ratings=[1.0, 1.0]),
    ]
    labels = table(tmp_path, rows)
    assert [(u.row, u.num_tokens, u.pair) for u in labels.train] == [(0, 6, True), (1, 1, False)]
    assert [u.row for u in labels.valid] == [2]
    assert labels.totals(labels.train) == {"num_pairs": 1.0, "num_ratings": 1.0}
    batch = labels.collate(labels.train)
    assert batch.ids_NS.tolist() == [[1, 2, 3], [1, 2, 9], [4, 9, 9]]
    assert batch.mask_NS.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert (batch.chosen_P.tolist(), batch.head_P.tolist(), batch.margin_P.tolist()) == ([0], [1], [0.5])
    assert batch.rated_NA.tolist() == [[0, 0], [0, 0], [1, 0]] and batch.rating_NA[2].tolist() == [2, 0]
    # head 1: gap 3 - 1 less margin 0.5; head 0 of the rated answer: (5 - 2)^2
    loss = label_loss(torch.tensor([[0.0, 3.0], [0.0, 1.0], [5.0, 0.0]]), batch, 1, 1)
    assert loss.total.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(-1.5)).item() + 9)


class Toy(torch.nn.Module):
    """Scores a sequence by the sum of its tokens' vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(10, 2)

    def forward(self, input_ids, attention_mask):
        out = torch.nn.Module()
        out.logits = (self.table(input_ids) * attention_mask[..., None]).sum(1)
        return out


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_add_up_to_the_whole(tmp_path, ranks):
    """Losses and gradients, with uneven lengths, both kinds of labels, and ranks that run dry."""
    rng = random.Random(1)

    def ids():
        return [rng.randrange(9) for _ in range(rng.randint(1, 12))]

    rows = [row(ids=ids(), rejected=ids(), head=i % 2, margin=0.1 * i) for i in range(7)]
    rows += [row(ids=ids(), ratings=[rng.random(), NAN if i % 2 else 1.0]) for i in range(4)]
    labels = table(tmp_path, rows)
    totals = labels.totals(labels.train)
    assert totals == {"num_pairs": 7.0, "num_ratings": 6.0}
    network = RewardNetwork(Toy(), torch.float32, "cpu")

    def learned(micros):
        network.zero_grad()
        losses = [network(labels.collate(m), **totals) for m in micros]
        sum(loss.total for loss in losses).backward()
        parts = {name: sum(float(loss.parts[name]) for loss in losses) for name in losses[0].parts}
        return parts, network.network.table.weight.grad.clone()

    whole, gradient = learned([labels.train])
    shards = labels.shards(labels.train, ranks, max_tokens=30)
    assert len({len(rank) for rank in shards}) == 1 and any(not micro for rank in shards for micro in rank)
    assert sorted(u.row for rank in shards for micro in rank for u in micro) == list(range(11))
    assert all(len({u.pair for u in micro}) < 2 for rank in shards for micro in rank)
    parts, summed = learned([micro for rank in shards for micro in rank])
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(summed, gradient)


def test_a_batch_without_rows_still_runs_the_network(tmp_path):
    labels = table(tmp_path, [row(ids=[1], ratings=[1.0, NAN])])
    network = RewardNetwork(Toy(), torch.float32, "cpu")
    loss = network(labels.collate([]), num_pairs=3, num_ratings=2)
    loss.total.backward()
    assert loss.total.item() == 0 and not network.network.table.weight.grad.any()
    assert set(loss.parts) == {"bradley_terry", "accuracy", "squared_error"}


def test_without_totals_the_network_gives_its_scores(tmp_path):
    labels = table(tmp_path, [row(ids=[1, 2], rejected=[1], head=0)])
    network = RewardNetwork(Toy(), torch.float32, "cpu")
    assert network(labels.collate(labels.train)).shape == (2, 2)
