"""Distillation: levels by hand, the fate of every row, and that neither row order nor restarts change a byte."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlray import config, schema
from ctrlray.distill import Distilled, Levels, distill, draw, prompt_quantiles, usable, water_fill
from ctrlray.errors import DataError
from ctrlray.train.batches import collate, load_example, planned_steps, shard, tree_rows

FINITE = st.floats(-1e6, 1e6, allow_nan=False, width=32)


def control(*levels: int) -> config.Control:
    names = ("kind", "brief", "calm")
    return config.Control(
        attributes=tuple(config.Attribute(name=n, levels=k) for n, k in zip(names, levels, strict=False))
    )


def row(i: int, prompt: str, *scores: float, text: str | None = None, finish: str = "stop") -> dict[str, object]:
    return {
        "response_id": f"r{i:03d}",
        "prompt_id": prompt,
        "messages": [{"role": "user", "content": f"question {prompt}"}],
        "text": f"answer {i}" if text is None else text,
        "token_ids": [i, 7],
        "finish_reason": finish,
        **{f"score_{n}": s for n, s in zip(("kind", "brief", "calm"), scores, strict=False)},
    }


def table(rows: list[dict[str, object]]) -> pa.Table:
    columns = [
        ("response_id", pa.string()),
        ("prompt_id", pa.string()),
        ("messages", schema.MESSAGES),
        ("text", pa.string()),
        ("token_ids", schema.TOKENS),
        ("finish_reason", pa.string()),
    ]
    scores = [(c, pa.float32()) for c in rows[0] if c.startswith("score_")]
    return pa.Table.from_pylist(rows, schema=pa.schema(columns + scores))


def random_pool(num_axes: int, num_prompts: int = 12, samples: int = 8, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_prompts * samples):
        finish = "length" if i % 11 == 0 else "stop"
        text = " \n" if i % 13 == 0 else "the same" if i % 7 == 0 else None
        rows.append(row(i, f"p{i % num_prompts:02d}", *rng.normal(size=num_axes).tolist(), text=text, finish=finish))
    return table(rows)


def wish(**kwargs: object) -> config.Distill:
    return config.Distill.model_validate(kwargs)


def reasons(result: Distilled) -> dict[str, str]:
    return dict(zip(result.dropped["response_id"].to_pylist(), result.dropped["reason"].to_pylist(), strict=True))


def ids(result: Distilled) -> list[str]:
    return result.examples["example_id"].to_pylist()


# ---------------------------------------------------------------- levels


def test_levels_by_hand():
    levels = Levels.fit([10.0, 20.0, 30.0, 40.0], 2)
    # mid-CDF of the four: 1/8, 3/8, 5/8, 7/8; units = 0.5 + 2 F = 0.75, 1.25, 1.75, 2.25; level 1 covers units 0.5..1.5
    assert levels.units([10, 20, 30, 40]).tolist() == [0.75, 1.25, 1.75, 2.25]
    assert levels.level([10, 20, 30, 40]).tolist() == [1, 1, 2, 2]
    # halfway between 20 and 30, F = 1/2: units 1.5, the upper edge of level 1
    assert levels.units(25.0) == 1.5 and levels.level(25.0) == 1
    # outside the pool: clamped to the ends of the scale
    assert levels.units([-1e9, 1e9]).tolist() == [0.5, 2.5]
    assert levels.level([-1e9, 1e9]).tolist() == [1, 2]


def test_ties_sit_at_the_middle_of_their_mass():
    levels = Levels.fit([0, 0, 0, 1], 4)
    # F(0) = (3 / 2) / 4 = 3/8 -> units 2.0; F(1) = (3 + 1/2) / 4 = 7/8 -> units 4.0
    assert levels.units([0, 1]).tolist() == [2.0, 4.0]
    assert levels.level([0, 1]).tolist() == [2, 4]


def test_constant_scores_sit_in_the_middle():
    levels = Levels.fit([3.0] * 5, 3)
    assert levels.units(3.0) == 2.0 and levels.level(3.0) == 2
    assert levels.units([2.9, 3.1]).tolist() == [0.5, 3.5]


@pytest.mark.parametrize("num_levels", [2, 3, 5])
def test_a_large_pool_gives_equal_bins(num_levels):
    scores = np.random.default_rng(0).normal(size=3000)
    levels = Levels.fit(scores, num_levels)
    counts = np.bincount(levels.level(scores), minlength=num_levels + 1)[1:]
    assert len(levels.scores) <= 402  # thinned
    assert np.abs(counts - 3000 / num_levels).max() <= 3000 / 201 + 1


def test_thinning_does_not_bend_the_line_beside_a_popular_score():
    scores = np.concatenate([np.arange(1000.0), np.full(1000, 999.5)])
    levels = Levels.fit(scores, 2)
    # 999 of 2000 answers are below 999.0, which counts half itself: F = 999.5 / 2000; the popular 999.5 follows at once
    assert levels.quantile(999.0) == pytest.approx(999.5 / 2000, abs=1e-12)
    assert levels.quantile(999.5) == pytest.approx(1500 / 2000, abs=1e-12)


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(2, 10))
def test_level_is_the_rounded_unit_and_rises_with_the_score(scores, num_levels):
    levels = Levels.fit(scores, num_levels)
    probe = np.sort([*scores, -1e9, 1e9, *(np.asarray(scores) + 0.3)])
    units, level = levels.units(probe), levels.level(probe)
    assert (np.diff(units) >= 0).all() and (np.diff(level) >= 0).all()
    assert units[0] == 0.5 and units[-1] == num_levels + 0.5
    assert (np.abs(units - level) <= 0.5 + 1e-8).all()


@given(st.lists(FINITE, min_size=1, max_size=50), st.integers(2, 10))
def test_levels_survive_json(scores, num_levels):
    levels = Levels.fit(scores, num_levels)
    assert Levels.from_dict(json.loads(json.dumps(levels.to_dict()))) == levels


@pytest.mark.parametrize(
    "raw",
    [{}, {"num_levels": 3, "scores": [], "cdf": []}, {"num_levels": 3, "scores": [2, 1], "cdf": [0.1, 0.2]}, []],
)
def test_a_broken_table_is_refused(raw):
    with pytest.raises(DataError, match="rerun the distill stage"):
        Levels.from_dict(raw)


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [math.inf]])
def test_scores_that_are_not_numbers_are_refused(scores):
    with pytest.raises(DataError):
        Levels.fit(scores, 3)


def test_units_of_nan_are_refused():
    with pytest.raises(DataError, match="1 of 2"):
        Levels.fit([1.0, 2.0], 3).units([1.0, math.nan])


def test_prompt_quantiles_by_hand():
    scores, prompts = [5, 1, 3, 100, 100, 300, 7], ["a", "a", "a", "b", "b", "b", "c"]
    # a: ranks 3 1 2 -> (rank - 0.5) / 3;   b: the tied two share rank 1.5;   c: alone -> none
    expected = [5 / 6, 1 / 6, 1 / 2, 1 / 3, 1 / 3, 5 / 6, math.nan]
    assert prompt_quantiles(scores, prompts).tolist() == pytest.approx(expected, nan_ok=True)


# ---------------------------------------------------------------- the fate of rows


def test_every_row_once_and_the_reasons():
    rows = [row(i, "a", i) for i in range(6)]
    rows += [row(6, "b", 3.0, finish="length"), row(7, "b", 4.0, text="  "), row(8, "b", 9.0, text="answer 9 ")]
    rows += [row(9, "b", 9.5)]  # the text of row 8 but for a blank
    result = distill(table(rows), control(2), wish(strategy="none"), 0)
    assert reasons(result) == {"r006": "truncated", "r007": "empty", "r009": "duplicate"}
    assert ids(result) == [f"r00{i}" for i in (0, 1, 2, 3, 4, 5, 8)]
    # quantiles come from the seven usable rows only: 0 1 2 3 4 5 9; F(3) = 3.5 / 7 is the upper edge of level 1
    assert result.examples["level_kind"].to_pylist() == [1, 1, 1, 1, 2, 2, 2]
    assert result.levels["kind"].scores == (0, 1, 2, 3, 4, 5, 9)
    assert result.cells_before == result.cells_after == {"1": 4, "2": 3}
    assert result.examples.schema.equals(schema.examples(["kind"]), check_metadata=True)
    assert result.dropped.schema.equals(schema.DROPPED, check_metadata=True)
    assert result.warnings == []


def test_an_answer_with_a_special_token_before_its_end_is_left_out():
    rows = [row(i, "a", i) for i in range(4)]  # token_ids [i, 7]: 7 ends the turn
    rows += [row(7, "a", 9.0), row(8, "a", 8.0, text="answer 7"), row(9, "a", 7.0, finish="length")]
    rows[5]["token_ids"] = [1, 2, 7]
    result = distill(table(rows), control(2), wish(strategy="none", keep_truncated=True), 0, frozenset({7, 99}))
    # r007 is [7, 7]; r008 has its text and stays, because r007 does not count; r009 was cut off, so its 7 ended nothing
    assert reasons(result) == {"r007": "special_tokens", "r009": "special_tokens"}
    assert ids(result) == ["r000", "r001", "r002", "r003", "r008"] and max(result.levels["kind"].scores) == 8
    # the judges' scales are fitted on the same rows
    assert [rows[i]["response_id"] for i in usable(table(rows), True, frozenset({7, 99}))] == ids(result)
    with pytest.raises(DataError, match=r"none of 7 answers is left \(7 special_tokens\); the model samples special tokens"):
        distill(table(rows), control(2), wish(keep_truncated=True), 0, frozenset(range(9)) | {9})


def test_truncated_answers_may_stay_and_their_missing_scores_may_not():
    rows = [row(0, "a", 1.0), row(1, "b", 2.0), row(2, "b", math.nan, finish="length")]
    assert ids(distill(table(rows), control(2), wish(strategy="none"), 0)) == ["r000", "r001"]
    with pytest.raises(DataError, match=r"score_kind.*'r002'"):
        distill(table(rows), control(2), wish(strategy="none", keep_truncated=True), 0)


def test_extremes_keeps_the_outer_third_of_either_axis():
    rows = [row(i, f"p{i}", i, abs(i - 4)) for i in range(9)]
    # kind: F = (i + 1/2) / 9, outer below 1/3 or above 2/3: all but i = 3, 4, 5
    # brief = |i - 4|: one 0, two each of 1..4; F(0) = 0.5/9 and F(1) = 2/9 are outer: 3, 4, 5 stay for brevity
    assert len(ids(distill(table(rows), control(3, 3), wish(strategy="extremes"), 0))) == 9
    only = distill(table(rows), control(3), wish(strategy="extremes"), 0)
    assert reasons(only) == dict.fromkeys(["r003", "r004", "r005"], "inner_quantile")
    assert only.cells_before == {"1": 3, "2": 3, "3": 3} and only.cells_after == {"1": 3, "3": 3}


def test_extremes_by_prompt_uses_the_rank_within_the_prompt():
    rows = [row(i, "a", i) for i in range(3)] + [row(i, "b", 100 + i) for i in range(3, 6)] + [row(6, "c", 50)]
    result = distill(table(rows), control(3), wish(strategy="extremes", labels="prompt"), 0)
    assert reasons(result) == {"r001": "inner_quantile", "r004": "inner_quantile", "r006": "single_answer"}
    assert result.examples["level_kind"].to_pylist() == [1, 3, 1, 3]
    assert result.cells_before == {"1": 2, "2": 2, "3": 2}
    assert len(result.levels["kind"].scores) == 7  # evaluation still goes by the whole pool


def test_water_fill_by_hand():
    # 10 over [9, 2, 5]: line 2 takes 6, the other 4 lift the two large cells to 4
    assert water_fill([9, 2, 5], 10) == [4, 2, 4]
    assert water_fill([5, 1, 5], 8) == [4, 1, 3]
    assert water_fill([3, 4], 100) == [3, 4]
    assert water_fill([3, 4, 5], 2) == [1, 1, 0]
    assert water_fill([], 5) == []


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 200))
def test_water_fill_spends_the_budget_and_robs_the_rich(counts, budget):
    quotas = water_fill(counts, budget)
    assert sum(quotas) == min(budget, sum(counts))
    assert all(q <= n for q, n in zip(quotas, counts, strict=True))
    cut = [q for q, n in zip(quotas, counts, strict=True) if q < n]
    assert not cut or max(quotas) - min(cut) <= 1


def cells_pool() -> pa.Table:
    """One axis of four levels whose usable answers fall 12, 8, 4, 8 into them, by ties."""
    scores = [0.0] * 12 + [1.0] * 8 + [2.0] * 4 + [3.0] * 8
    return table([row(i, f"p{i % 5}", s) for i, s in enumerate(scores)])


def test_balance_stops_at_the_median_cell_and_weighs_up_the_short_one():
    result = distill(cells_pool(), control(4), wish(strategy="balance"), 0)
    # F of the four scores: 6/32, 16/32, 22/32, 28/32 -> levels 1, 2, 3, 4
    assert result.cells_before == {"1": 12, "2": 8, "3": 4, "4": 8}
    assert result.cells_after == {"1": 8, "2": 8, "3": 4, "4": 8}  # median of 12 8 4 8 is 8
    assert set(reasons(result).values()) == {"cell_full"}
    # raw weights 1 1 2 1 over 8 8 4 8 rows: sum 32 over 28 rows, mean 8/7
    weights = dict(zip(result.examples["level_kind"].to_pylist(), result.examples["weight"].to_pylist(), strict=True))
    assert weights == pytest.approx({1: 7 / 8, 2: 7 / 8, 3: 7 / 4, 4: 7 / 8})
    assert np.mean(result.examples["weight"].to_pylist()) == pytest.approx(1)


def test_balance_fills_the_budget_from_below():
    result = distill(cells_pool(), control(4), wish(strategy="balance", max_examples=19), 0)
    # line 4 takes 16; of the 3 left each larger cell gets one
    assert result.cells_after == {"1": 5, "2": 5, "3": 4, "4": 5}


@pytest.mark.parametrize("strategy", ["none", "extremes"])
def test_over_budget(strategy):
    result = distill(cells_pool(), control(4), wish(strategy=strategy, max_examples=10), 0)
    assert result.examples.num_rows == 10 and "over_budget" in reasons(result).values()
    assert set(result.examples["weight"].to_pylist()) == {1.0}
    other = distill(cells_pool(), control(4), wish(strategy=strategy, max_examples=10), 1)
    assert ids(other) != ids(result)  # the seed chooses


def test_moec_is_extremes_then_balance():
    pool = random_pool(2, num_prompts=20)
    outer = distill(pool, control(3, 3), wish(strategy="extremes"), 0)
    both = distill(pool, control(3, 3), wish(strategy="moec"), 0)
    inner = {i for i, why in reasons(outer).items() if why == "inner_quantile"}
    assert inner and inner == {i for i, why in reasons(both).items() if why == "inner_quantile"}
    assert set(ids(both)) < set(ids(outer))
    assert max(both.cells_after.values()) < max(outer.cells_after.values())


# ---------------------------------------------------------------- split and counterfactuals


def test_whole_prompts_are_held_out():
    result = distill(random_pool(1, num_prompts=10), control(2), wish(strategy="none", valid_fraction=0.25), 0)
    split = set(zip(result.examples["prompt_id"].to_pylist(), result.examples["split"].to_pylist(), strict=True))
    # 0.25 * 10 = 2.5 rounds to 3
    assert len(split) == 10 and Counter(s for _, s in split) == {"train": 7, "valid": 3}


@pytest.mark.parametrize("fraction, valid", [(0.01, 1), (0.99, 1)])
def test_two_prompts_give_one_to_each_side(fraction, valid):
    rows = [row(i, f"p{i % 2}", i) for i in range(4)]
    result = distill(table(rows), control(2), wish(strategy="none", valid_fraction=fraction), 0)
    assert Counter(result.examples["split"].to_pylist()) == {"train": 2, "valid": 2 * valid}


def test_one_prompt_cannot_be_held_out():
    result = distill(table([row(i, "p", i) for i in range(4)]), control(2), wish(strategy="none"), 0)
    assert set(result.examples["split"].to_pylist()) == {"train"} and "one prompt" in result.warnings[0]


@pytest.mark.parametrize("levels", [(3,), (3, 3), (2, 3, 4)])
def test_wrong_codes_differ_from_the_right_one_and_from_each_other(levels):
    result = distill(random_pool(len(levels)), control(*levels), wish(strategy="none", counterfactuals=2), 0)
    names = [a.name for a in control(*levels).attributes]
    for example in result.examples.to_pylist():
        own = tuple(example[f"level_{n}"] for n in names)
        wrong = {tuple(c["levels"]) for c in example["counterfactuals"]}
        assert len(wrong) == 2 and own not in wrong
        assert all(1 <= k <= top for code in wrong for k, top in zip(code, levels, strict=True))
        assert all(c["token_ids"] == example["token_ids"] for c in example["counterfactuals"])


def test_all_wrong_codes_when_more_are_asked_than_exist():
    result = distill(random_pool(1), control(3), wish(strategy="none", counterfactuals=8), 0)
    for example in result.examples.to_pylist():
        assert {c["levels"][0] for c in example["counterfactuals"]} == {1, 2, 3} - {example["level_kind"]}
    assert any("only 2 others" in w for w in result.warnings)


def test_draw_is_uniform_over_the_others():
    counts = Counter(item for i in range(6000) for item in draw(5, 3, 2, "key", i))
    # each of the four others is one of the two drawn with probability 1/2: 3000, standard deviation 39
    assert set(counts) == {0, 1, 2, 4} and all(abs(n - 3000) < 200 for n in counts.values())
    first = Counter(draw(5, 3, 2, "key", i)[0] for i in range(6000))
    assert all(abs(n - 1500) < 170 for n in first.values())


def test_wrong_responses_are_answers_of_another_cell_to_the_same_prompt():
    rows = [row(0, "a", 0), row(1, "a", 1), row(2, "a", 10), row(3, "a", 11), row(4, "b", 0.5), row(5, "b", 0.7)]
    result = distill(table(rows), control(2), wish(strategy="none", counterfactual="response", counterfactuals=3), 0)
    # scores 0 .5 .7 | 1 10 11: rows 0, 4 and 5 are level 1, rows 1, 2 and 3 level 2
    wrong = {e["example_id"]: e["counterfactuals"] for e in result.examples.to_pylist()}
    tokens = {i: sorted(c["token_ids"][0] for c in w) for i, w in wrong.items()}
    assert tokens == {"r000": [1, 2, 3], "r001": [0], "r002": [0], "r003": [0], "r004": [], "r005": []}
    assert [c["levels"] for c in wrong["r000"]] == [[1]] * 3
    assert any(w.startswith("2 of 6 examples have no wrong pair") for w in result.warnings)


# ---------------------------------------------------------------- order, edges, errors


@pytest.mark.parametrize("strategy", ["none", "balance", "extremes", "moec"])
@pytest.mark.parametrize("labels", ["global", "prompt"])
@pytest.mark.parametrize("counterfactual", ["code", "response"])
@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(96)), num_axes=st.integers(1, 3))
def test_row_order_changes_no_byte(strategy, labels, counterfactual, order, num_axes):
    pool = random_pool(num_axes)
    want = wish(
        strategy=strategy, labels=labels, counterfactual=counterfactual, counterfactuals=2, max_examples=30, outer=0.3
    )
    plain = distill(pool, control(*[3] * num_axes), want, 5)
    mixed = distill(pa.concat_tables([pool.take(order[:40]), pool.take(order[40:])]), control(*[3] * num_axes), want, 5)
    assert plain.examples.equals(mixed.examples, check_metadata=True)
    assert _bytes(plain.examples) == _bytes(mixed.examples) and _bytes(plain.dropped) == _bytes(mixed.dropped)
    assert plain[2:] == mixed[2:]
    assert sorted(ids(plain) + list(reasons(plain))) == sorted(pool["response_id"].to_pylist())
    assert plain.examples.num_rows <= 30
    assert sum(plain.cells_after.values()) == plain.examples.num_rows


def _bytes(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def test_constant_scores_warn_and_name_the_cell():
    rows = [row(i, f"p{i % 3}", 1.0, 2.5) for i in range(9)]
    result = distill(table(rows), control(3, 3), wish(strategy="balance"), 0)
    assert result.cells_after == {"2,2": 9}
    step = "; add behaviours (generate.behaviours) or choose another score"
    assert any("score_brief is 2.5" in w and w.endswith(step) for w in result.warnings)
    assert any("one cell (kind, brief = 2,2)" in w and w.endswith(step) for w in result.warnings)
    with pytest.raises(DataError, match=r"9 inner_quantile.*raise distill\.outer"):
        distill(table(rows), control(3, 3), wish(strategy="moec"), 0)


@pytest.mark.parametrize("wrong", [False, True])
def test_examples_of_one_cell_are_made_ready_for_training(wrong):
    """Two ranks, three steps: each example is there once under its own code, and its wrong codes are those of other cells."""
    rows = [row(i, f"p{i % 3}", 1.0, 2.5) for i in range(9)]
    examples = distill(table(rows), control(3, 3), wish(strategy="balance"), 0).examples.to_pylist()
    loaded = [load_example(e, ["kind", "brief"], lambda messages, levels: [1, *(10 + v for v in levels)]) for e in examples]
    steps = planned_steps([e.group for e in loaded], batch_size=3, epochs=1, seed=0)
    right = []
    for step in steps:
        shards = shard(tree_rows([(i, loaded[i]) for i in step], wrong=wrong, share=True), ranks=2, max_tokens=40)
        assert len(shards[0]) == len(shards[1])
        for micro in (m for rank in shards for m in rank):
            assert collate(micro, pad_id=0).mask_NT.shape[0] == sum(len(r.branches) for r in micro)
            branches = [(r.prompt_ids + b.code_ids, b) for r in micro for b in r.branches]
            assert all(b.right == (codes == (1, 12, 12)) for codes, b in branches)
            assert not micro or wrong == any(not b.right for _, b in branches)
            right += [b.example for _, b in branches if b.right]
    assert len(steps) == 3 and sorted(right) == list(range(9))


def test_nothing_left_says_what_to_do():
    rows = [row(i, "p", 1.0, finish="length") for i in range(3)]
    with pytest.raises(DataError, match=r"none of 3 answers.*3 truncated.*max_tokens"):
        distill(table(rows), control(3), wish(), 0)


def test_tables_that_break_the_contract():
    rows = [row(0, "a", 1.0), row(0, "b", 2.0)]
    with pytest.raises(DataError, match="'r000' appears 2 times"):
        distill(table(rows), control(3), wish(), 0)
    with pytest.raises(DataError, match="score_brief"):
        distill(table(rows), control(3, 3), wish(), 0)
    with pytest.raises(DataError, match="pool is empty"):
        distill(table(rows).slice(0, 0), control(3), wish(), 0)


def test_other_arrow_types_are_taken():
    pool = random_pool(1)
    large = pool.set_column(3, "text", pool["text"].cast(pa.large_string()))
    want = wish(strategy="none")
    assert distill(large, control(3), want, 0).examples.equals(distill(pool, control(3), want, 0).examples)
