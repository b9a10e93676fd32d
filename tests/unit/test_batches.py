from __future__ import annotations

import pytest

from ctrlray.train.batches import Branch, TrainExample, TreeRow, collate, epoch_steps, shard, tree_rows

A = TrainExample(prompts=((1, 2, 8), (1, 2, 9)), responses=((5, 6), (5, 6)), weight=1.0, group="p")
B = TrainExample(prompts=((1, 2, 9), (1, 2, 8)), responses=((7,), (7,)), weight=2.0, group="p")


def test_tree_row_by_hand():
    (row,) = tree_rows([(0, A), (1, B)], wrong=True, share=True)
    assert row.prompt_ids == (1, 2)
    assert [b.code_ids for b in row.branches] == [(8,), (9,), (9,), (8,)]
    assert [b.right for b in row.branches] == [True, False, True, False]
    assert row.num_tokens == 2 + 3 + 3 + 2 + 2


def test_packed_row_by_hand():
    rows = [*tree_rows([(0, A)], wrong=True, share=True), TreeRow((4,), (Branch((8,), (7,), True, 1.0, 1),))]
    batch = collate(rows, pad_id=0, multiple=4)
    assert batch.input_ids_RS.tolist() == [[1, 2, 8, 5, 6, 9, 5, 6, 4, 8, 7, 0]]
    assert batch.position_ids_RS.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 0, 1, 2, 0]]
    assert batch.spans_K4[:5].tolist() == [[0, 2, 0, 0], [2, 5, 0, 2], [5, 8, 0, 2], [8, 9, 0, 0], [9, 11, 8, 9]]
    assert batch.spans_K4[5, :2].tolist() == [11, 12] and batch.spans_K4[5, 2] == batch.spans_K4[5, 3]  # the filler
    # the code predicts the first token, each token the next; the last branch has one token
    assert batch.source_NT.tolist() == [[2, 3], [5, 6], [9, 0]]
    assert batch.target_NT.tolist() == [[5, 6], [5, 6], [7, 0]]
    assert batch.mask_NT.tolist() == [[1, 1], [1, 1], [1, 0]]


def test_padded_rows_by_hand():
    batch = collate(tree_rows([(0, A), (1, B)], wrong=False, share=False), pad_id=0, packed=False)
    assert batch.input_ids_RS.tolist() == [[1, 2, 8, 5, 6], [1, 2, 9, 7, 0]]
    assert batch.present_RS.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch.source_NT.tolist() == [[2, 3], [7, 0]]
    with pytest.raises(ValueError, match="several branches"):
        collate(tree_rows([(0, A)], wrong=True, share=True), pad_id=0, packed=False)


def test_unshared_rows_have_one_branch():
    rows = tree_rows([(0, A), (1, B)], wrong=True, share=False)
    assert [len(r.branches) for r in rows] == [1, 1, 1, 1]
    assert len(tree_rows([(0, A), (1, B)], wrong=False, share=False)) == 2


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


def test_padding_counts_towards_a_padded_micro_batch():
    examples = [(i, TrainExample(((1,),), (tuple([5] * n),), 1.0, f"p{i}")) for i, n in enumerate((9, 4, 4, 1))]
    rows = tree_rows(examples, wrong=False, share=False)  # 10, 5, 5 and 2 tokens
    lengths = lambda packed: [[r.num_tokens for r in m] for m in shard(rows, 1, 20, packed=packed)[0]]  # noqa: E731
    assert lengths(True) == [[10, 5, 5], [2]]
    assert lengths(False) == [[10, 5], [5, 2]]


def test_packs_fill_the_room_that_is_left():
    examples = [(i, TrainExample(((1,),), (tuple([5] * n),), 1.0, f"p{i}")) for i, n in enumerate((7, 6, 2, 1))]
    packs = shard(tree_rows(examples, wrong=False, share=False), 1, 11)[0]  # rows of 8, 7, 3, 2
    assert [[r.num_tokens for r in m] for m in packs] == [[8, 3], [7, 2]]


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
