"""The grid out of answers and their scores: who stands in which cell."""

from __future__ import annotations

import math

import numpy as np

from ctrlray import config, schema
from ctrlray.distill import Levels
from ctrlray.isolate import DIED
from ctrlray.stages import grid as grids
from ctrlray.stages import questions

JOB = config.parse(
    config.Job,
    {
        "name": "t",
        "control": {"attributes": [{"name": "a", "levels": 3}, {"name": "b", "levels": 2}]},
        "rewards": [{"type": "function", "target": "m:f", "attributes": ["a", "b"]}],
        "evaluate": {"methods": ["start", "reranking"], "candidates": 3, "samples": 2},
    },
    where="test",
)
CELLS = [(1, 1), (3, 1), (2, 2)]
SCALES = {"a": Levels.fit(np.arange(100.0), 3), "b": Levels.fit(np.arange(100.0), 2)}


def answer(method, sample, text, finish="stop"):
    return {
        "grid_id": schema.digest("p", method, sample), "prompt_id": "p", "method": method, "sample": sample, "text": text,
        "num_tokens": len(text), "finish_reason": finish, "weights_version": 0, "requested_a": 1, "requested_b": 1,
    }  # fmt: skip


def by_text(scores):
    return {schema.digest("p", text): {"a": float(a), "b": float(b)} for text, (a, b) in scores.items()}


def grid(answers, scores, judge=None):
    judged = grids.Scored(by_text(judge), SCALES) if judge is not None else None
    table, failed = grids.build(answers, JOB, CELLS, grids.Scored(by_text(scores), SCALES), judged)
    return {(r["requested_a"], r["requested_b"]): r for r in table.to_pylist()}, failed


def test_reranking_takes_the_nearest_candidate_for_each_cell():
    """Low, high and middle scores: the cells (1, 1), (3, 1) and (2, 2) get one each."""
    scores = {"low": (5, 5), "high": (95, 10), "middle": (50, 90)}
    found, failed = grid([answer("reranking", i, t) for i, t in enumerate(scores)], scores)
    assert {cell: r["text"] for cell, r in found.items()} == {(1, 1): "low", (3, 1): "high", (2, 2): "middle"}
    assert failed == {} and len({r["grid_id"] for r in found.values()}) == 3
    assert all(r["sample"] == 0 and r["method"] == "reranking" for r in found.values())


def test_a_failed_candidate_is_counted_and_never_chosen_over_one_with_a_score():
    answers = [answer("reranking", 0, "", DIED), answer("reranking", 1, "unscored"), answer("reranking", 2, "low")]
    found, failed = grid(answers, {"low": (5, 5)})
    assert {r["text"] for r in found.values()} == {"low"} and failed == {DIED: 1, "score": 1}


def test_without_any_score_the_cells_stay_with_nan():
    found, failed = grid([answer("reranking", 0, "x"), answer("reranking", 1, "y")], {})
    assert failed == {"score": 2} and {r["text"] for r in found.values()} == {"x"}
    assert all(math.isnan(r["units_a"]) for r in found.values())


def test_equal_candidates_first_sampled_first():
    answers = [answer("reranking", 1, "later"), answer("reranking", 0, "first")]
    found, _ = grid(answers, {"later": (50, 50), "first": (50, 50)})
    assert {r["text"] for r in found.values()} == {"first"}


def test_the_start_models_answer_stands_in_every_cell():
    found, _ = grid([answer("start", 0, "low")], {"low": (5, 5)})
    assert set(found) == set(CELLS) and {r["text"] for r in found.values()} == {"low"}


class Plain:
    def render(self, messages, levels=None):
        return [len(messages[0]["content"]), *(levels or ())]


def test_candidates_are_sampled_once_for_all_cells():
    from ctrlray.control import ControlSpace

    prompts = [{"prompt_id": "p", "messages": [{"role": "user", "content": "hi"}]}]
    space = ControlSpace.of(JOB.control)
    methods = ("start", "reranking", "clm")
    asked = {m: questions.questions(m, prompts, CELLS, questions.samples(m, JOB), space, Plain()) for m in methods}
    assert {m: len(q) for m, q in asked.items()} == {"start": 2, "reranking": 3, "clm": 6}
    assert all(q.token_ids == [2] for q in asked["reranking"])
    assert len({q.grid_id for every in asked.values() for q in every}) == 11


def test_judges_score_beside_the_rewards_and_choose_nothing():
    """Reranking goes by the training rewards: under the judge the chosen answers may be the wrong ones."""
    scores = {"low": (5, 5), "high": (95, 10), "middle": (50, 90)}
    judge = {"low": (95, 10), "high": (5, 5)}  # and nothing of `middle`
    found, failed = grid([answer("reranking", i, t) for i, t in enumerate(scores)], scores, judge)
    assert {cell: r["text"] for cell, r in found.items()} == {(1, 1): "low", (3, 1): "high", (2, 2): "middle"}
    assert failed == {} and found[(1, 1)]["judge_score_a"] == 95 and found[(3, 1)]["judge_score_a"] == 5
    # F(95) of 0..99 is (95 + 0.5) / 100: 0.5 + 3 x 0.955
    assert found[(1, 1)]["judge_units_a"] == np.float32(0.5 + 3 * 0.955)
    assert math.isnan(found[(2, 2)]["judge_units_a"]) and math.isnan(found[(2, 2)]["judge_score_b"])


def test_without_judges_the_grid_has_no_columns_of_theirs():
    found, _ = grid([answer("start", 0, "low")], {"low": (5, 5)})
    assert not [c for c in found[(1, 1)] if c.startswith("judge")]


def test_a_lost_answer_has_no_score_though_another_answer_is_empty_too():
    found, failed = grid([answer("clm", 0, "", DIED)], {"": (5, 5)})
    assert failed == {DIED: 1} and math.isnan(found[(1, 1)]["units_a"])


def test_distinct_texts_are_scored_once_and_lost_ones_not_at_all():
    rows = [answer("clm", 0, "x"), answer("start", 0, "x"), answer("clm", 1, "y"), answer("clm", 2, "", DIED)]
    assert sorted(grids.texts_of(rows).values()) == [("p", "x"), ("p", "y")]
