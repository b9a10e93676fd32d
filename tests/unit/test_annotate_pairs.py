"""Which pairs a study shows: contrasts, balance of what is shown and of sides, order."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from ctrlray.annotate.pairs import Answer, draw_pairs

CELLS = list(itertools.product((1, 2, 3), (1, 2, 3)))


def answer(prompt, cell, group="exmate", text=None):
    name = f"{group}-{prompt}-{''.join(map(str, cell))}"
    return Answer(name, f"p{prompt}", group, cell, name if text is None else text, {"reward": {"x": 1.0}})


def grid(num_prompts=12, groups=("exmate",)):
    return [answer(p, c, g) for p in range(num_prompts) for c in CELLS for g in groups]


def axes(pair):
    return tuple(i for i, (x, y) in enumerate(zip(pair.a.levels, pair.b.levels, strict=True)) if x != y)


def test_pairs_share_prompt_and_method_and_differ_in_one_attribute():
    drawn = draw_pairs(grid(groups=("exmate", "clm")), 80, seed=0)
    assert len(drawn.pairs) == 80 and drawn.num_contrasts == 12 * 2 * 18  # 2 axes x 3 rests x 3 pairs of levels
    for pair in drawn.pairs:
        assert (pair.a.prompt_id, pair.a.group) == (pair.b.prompt_id, pair.b.group) and len(axes(pair)) == 1
    assert len({p.item_id for p in drawn.pairs}) == 80


@pytest.mark.parametrize("seed", range(5))
def test_what_is_shown_is_spread_evenly(seed):
    pairs = draw_pairs(grid(groups=("exmate", "clm")), 72, seed).pairs
    assert set(Counter(p.a.group for p in pairs).values()) == {36}
    assert set(Counter((p.a.group, axes(p)) for p in pairs).values()) == {18}
    levels = Counter((p.a.group, axes(p), frozenset(s.levels[axes(p)[0]] for s in (p.a, p.b))) for p in pairs)
    assert set(levels.values()) == {6}
    prompts = Counter(p.a.prompt_id for p in pairs)
    assert len(prompts) == 12 and max(prompts.values()) - min(prompts.values()) <= 2


@pytest.mark.parametrize("seed", range(8))
def test_sides_are_balanced_for_every_attribute_and_method(seed):
    pairs = draw_pairs(grid(groups=("exmate", "clm")), 60, seed).pairs
    high_on_a = Counter((p.a.group, axes(p), p.a.levels > p.b.levels) for p in pairs)
    for group, axis in itertools.product(("exmate", "clm"), ((0,), (1,))):
        assert abs(high_on_a[group, axis, True] - high_on_a[group, axis, False]) <= 1


def test_sides_do_not_follow_the_order_shown():
    high = [p.a.levels > p.b.levels for p in draw_pairs(grid(), 100, seed=1).pairs]
    repeats = sum(x == y for x, y in itertools.pairwise(high))
    assert 30 < repeats < 70  # neither in blocks nor in turns


def test_the_order_shown_follows_neither_levels_nor_prompts():
    shown = [p.a for p in draw_pairs(grid(), 108, seed=1).pairs]  # of 9 cells and 12 prompts
    for name in ("levels", "prompt_id"):
        assert sum(getattr(x, name) == getattr(y, name) for x, y in itertools.pairwise(shown)) < 30


def test_the_side_of_a_single_pair_is_a_matter_of_the_seed():
    high = [p.a.levels > p.b.levels for seed in range(20) for p in draw_pairs(grid(1)[:2], 1, seed).pairs]
    assert 4 < sum(high) < 16


def test_a_seed_gives_the_same_study_whatever_the_order_of_rows_and_another_seed_another():
    rows = grid()
    first = draw_pairs(rows, 30, seed=4)
    assert draw_pairs(rows[::-1], 30, seed=4) == first
    other = draw_pairs(rows, 30, seed=5)
    assert {p.item_id for p in other.pairs} != {p.item_id for p in first.pairs}


def test_names_of_items_do_not_depend_on_sides():
    ours = {p.item_id: {p.a.row_id, p.b.row_id} for p in draw_pairs(grid(1), 18, seed=0).pairs}
    flipped = [Answer(a.row_id, a.prompt_id, a.group, tuple(4 - x for x in a.levels), a.text, a.scores) for a in grid(1)]
    assert {p.item_id: {p.a.row_id, p.b.row_id} for p in draw_pairs(flipped, 18, seed=0).pairs} == ours


def test_ends_are_the_lowest_against_the_highest():
    pairs = draw_pairs(grid(), 40, seed=0, which="ends").pairs
    assert len(pairs) == 40 and all({p.a.levels[i], p.b.levels[i]} == {1, 3} for p in pairs for i in axes(p))


def test_training_rows_may_differ_in_every_attribute():
    drawn = draw_pairs(grid(groups=("pool",)), 120, seed=0, single=False)
    kinds = Counter(axes(p) for p in drawn.pairs)
    assert kinds == {(0,): 40, (1,): 40, (0, 1): 40}
    for axis in (0, 1):
        higher = [p.a.levels[axis] > p.b.levels[axis] for p in drawn.pairs if axis in axes(p)]
        assert abs(2 * sum(higher) - len(higher)) <= 4


def test_what_cannot_be_compared_is_left_out_and_counted():
    rows = [answer(0, (1, 1), text="same"), answer(0, (2, 1), text="same "), answer(0, (3, 1), text=" "), answer(0, (1, 2))]
    drawn = draw_pairs(rows, 9, seed=0)
    assert [{p.a.levels, p.b.levels} for p in drawn.pairs] == [{(1, 1), (1, 2)}]
    assert drawn.left_out == {"answers without text": 1, "pairs of one text": 1}


def test_one_sample_against_another_of_the_same_cell_is_no_contrast():
    rows = [answer(0, (1, 1)), answer(0, (1, 1), text="other")]
    assert draw_pairs(rows, 9, seed=0).pairs == [] and draw_pairs([], 9, seed=0).pairs == []


def test_a_kind_with_too_few_pairs_leaves_its_share_to_others():
    rows = [*(answer(p, (1, c)) for p in range(9) for c in (1, 2)), answer(0, (2, 1))]
    kinds = Counter(axes(p) for p in draw_pairs(rows, 9, seed=0).pairs)
    assert kinds == {(0,): 1, (1,): 8}
