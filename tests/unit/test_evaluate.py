"""The grid out of answers and their scores: who stands in which cell."""

from __future__ import annotations

import math

import numpy as np

from ctrlray import config, schema
from ctrlray.distill import Levels
from ctrlray.isolate import DIED
from ctrlray.stages import evaluate
from ctrlray.tables import Storage, from_rows

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


def grid(tmp_path, answers, scores):
    out = Storage(str(tmp_path))
    rows = [{"response_id": schema.digest("p", text), "score_a": a, "score_b": b} for text, (a, b) in scores.items()]
    out.write_table(from_rows(rows, schema.scores(["a", "b"])), "scores")
    table, failed = evaluate._grid(answers, JOB, CELLS, SCALES, out)
    return {(r["requested_a"], r["requested_b"]): r for r in table.to_pylist()}, failed


def test_reranking_takes_the_nearest_candidate_for_each_cell(tmp_path):
    """Low, high and middle scores: the cells (1, 1), (3, 1) and (2, 2) get one each."""
    scores = {"low": (5, 5), "high": (95, 10), "middle": (50, 90)}
    found, failed = grid(tmp_path, [answer("reranking", i, t) for i, t in enumerate(scores)], scores)
    assert {cell: r["text"] for cell, r in found.items()} == {(1, 1): "low", (3, 1): "high", (2, 2): "middle"}
    assert failed == {} and len({r["grid_id"] for r in found.values()}) == 3
    assert all(r["sample"] == 0 and r["method"] == "reranking" for r in found.values())


def test_a_failed_candidate_is_counted_and_never_chosen_over_one_with_a_score(tmp_path):
    answers = [answer("reranking", 0, "", DIED), answer("reranking", 1, "unscored"), answer("reranking", 2, "low")]
    found, failed = grid(tmp_path, answers, {"low": (5, 5)})
    assert {r["text"] for r in found.values()} == {"low"} and failed == {DIED: 1, "score": 1}


def test_without_any_score_the_cells_stay_with_nan(tmp_path):
    found, failed = grid(tmp_path, [answer("reranking", 0, "x"), answer("reranking", 1, "y")], {})
    assert failed == {"score": 2} and {r["text"] for r in found.values()} == {"x"}
    assert all(math.isnan(r["units_a"]) for r in found.values())


def test_equal_candidates_first_sampled_first(tmp_path):
    answers = [answer("reranking", 1, "later"), answer("reranking", 0, "first")]
    found, _ = grid(tmp_path, answers, {"later": (50, 50), "first": (50, 50)})
    assert {r["text"] for r in found.values()} == {"first"}


def test_the_start_models_answer_stands_in_every_cell(tmp_path):
    found, _ = grid(tmp_path, [answer("start", 0, "low")], {"low": (5, 5)})
    assert set(found) == set(CELLS) and {r["text"] for r in found.values()} == {"low"}


class Plain:
    def render(self, messages, levels=None):
        return [len(messages[0]["content"]), *(levels or ())]


def test_candidates_are_sampled_once_for_all_cells():
    from ctrlray.control import ControlSpace

    prompts = [{"prompt_id": "p", "messages": [{"role": "user", "content": "hi"}]}]
    space = ControlSpace.of(JOB.control)
    asked = {
        m: evaluate.questions(m, prompts, CELLS, evaluate._samples(m, JOB), space, Plain()) for m in ("start", "reranking", "clm")
    }
    assert {m: len(q) for m, q in asked.items()} == {"start": 2, "reranking": 3, "clm": 6}
    assert all(q.token_ids == [2] for q in asked["reranking"])
    assert len({q.grid_id for questions in asked.values() for q in questions}) == 11
