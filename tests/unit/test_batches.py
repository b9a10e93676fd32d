from __future__ import annotations

import pytest
import torch

from ctrlray.train.batches import TrainExample, collate, epoch_steps, shard, tree_rows

A = TrainExample(prompts=((1, 2, 8), (1, 2, 9)), responses=((5, 6), (5, 6)), weight=1.0, group="p")
B = TrainExample(prompts=((1, 2, 9), (1, 2, 8)), responses=((7,), (7,)), weight=2.0, group="p")


def test_tree_row_by_hand():
    (row,) = tree_rows([(0, A), (1, B)], wrong=True, share=True)
    assert row.prompt_ids == (1, 2)
    assert [b.code_ids for b in row.branches] == [(8,), (9,), (9,), (8,)]
    assert [b.right for b in row.branches] == [True, False, True, False]
    assert row.num_tokens == 2 + 3 + 3 + 2 + 2


def test_collate_by_hand():
    (row,) = tree_rows([(0, A)], wrong=True, share=True)
    batch = collate([row], pad_id=0)
    assert batch.input_ids_RS.tolist() == [[1, 2, 8, 5, 6, 9, 5, 6]]
    assert batch.position_ids_RS.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert batch.source_NT.tolist() == [[2, 3], [5, 6]]  # the code predicts the first token, each token the next
    assert batch.target_NT.tolist() == [[5, 6], [5, 6]]
    seen = batch.allowed_RSS[0]
    assert seen[7].tolist() == [True, True, False, False, False, True, True, True]  # prompt and its own branch only
    assert seen[4].tolist() == [True, True, True, True, True, False, False, False]


def test_unshared_rows_have_one_branch():
    rows = tree_rows([(0, A), (1, B)], wrong=True, share=False)
    assert [len(r.branches) for r in rows] == [1, 1, 1, 1]
    assert len(tree_rows([(0, A), (1, B)], wrong=False, share=False)) == 2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_shared_pass_equals_separate_passes(kind):
    """Log-probs and gradients of branches in one tree row equal those of ordinary sequences, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ctrlray.config import ExMATE
    from ctrlray.train.models import Learner

    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        kind, vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, sliding_window=None, attention_dropout=0.0,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    learner = Learner(network, ExMATE(weight=0.7), torch.float32)
    examples = [(0, A), (1, B)]
    grads = []
    for share in (True, False):
        network.zero_grad()
        batch = collate(tree_rows(examples, wrong=True, share=share), pad_id=0)
        loss = learner(batch, num_tokens=4.0, num_wrong=2.0)
        loss.total.backward()
        grads.append((loss.total.item(), {n: p.grad.clone() for n, p in network.named_parameters()}))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-5)
    for name, grad in grads[0][1].items():
        assert torch.allclose(grad, grads[1][1][name], atol=1e-5), name


def test_steps_cover_each_example_once():
    groups = [f"p{i // 5}" for i in range(23)]
    steps = epoch_steps(groups, batch_size=4, seed=1, epoch=0)
    assert sorted(i for s in steps for i in s) == list(range(23))
    assert steps == epoch_steps(groups, 4, 1, 0) and steps != epoch_steps(groups, 4, 1, 1)


def test_every_rank_has_as_many_micro_batches():
    rows = tree_rows([(i, A) for i in range(5)], wrong=False, share=False)
    shards = shard(rows, ranks=2, max_tokens=10)
    assert len(shards[0]) == len(shards[1])
    assert sorted(r.branches[0].example for rank in shards for micro in rank for r in micro) == [0, 1, 2, 3, 4]
    assert all(sum(r.num_tokens for r in micro) <= 10 for rank in shards for micro in rank)


def test_ranks_carry_alike():
    sizes = [9, 8, 7, 6, 5, 4, 3, 2]
    examples = [(i, TrainExample(((1, 2),), (tuple([5] * n),), 1.0, f"p{i}")) for i, n in enumerate(sizes)]
    shards = shard(tree_rows(examples, wrong=False, share=True), ranks=2, max_tokens=1000)
    # longest first to the lighter rank: 11+8+7+4 and 10+9+6+5, prompts of two tokens included
    assert [sum(r.num_tokens for micro in rank for r in micro) for rank in shards] == [30, 30]


def test_equal_prompts_leave_their_last_token_to_the_branches():
    """It predicts each answer's first token, so it cannot be shared when nothing follows it in the prompt."""
    same = TrainExample(((1, 2, 8), (1, 2, 8)), ((5,), (6,)), 1.0, "p")
    (row,) = tree_rows([(0, same)], wrong=True, share=True)
    assert row.prompt_ids == (1, 2) and [b.code_ids for b in row.branches] == [(8,), (8,)]
    assert collate([row], pad_id=0).source_NT.tolist() == [[2], [4]]


def test_empty_micro_batch_has_no_answers():
    batch = collate([], pad_id=3)
    assert batch.mask_NT.shape[0] == 0 and batch.input_ids_RS.tolist() == [[3]]
