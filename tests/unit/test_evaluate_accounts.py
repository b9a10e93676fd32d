"""What the evaluate stage asks, what it keeps from engines, and its accounts; with fake engines and rewards, without Ray."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ctrlray import clock, config, schema
from ctrlray.control import ControlSpace
from ctrlray.distill import Levels
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.errors import DataError
from ctrlray.isolate import DIED
from ctrlray.ledger import Silent
from ctrlray.stages import evaluate, grid, questions
from ctrlray.tables import Storage, from_rows

CONTEXT, ROOM = 256, 100
"""Tokens of the model's context, and of an answer."""


def job(**more):
    raw = {
        "name": "t",
        "model": {"max_context": CONTEXT},
        "control": {"attributes": [{"name": "a", "levels": 2}, {"name": "b", "levels": 2}]},
        "rewards": [{"type": "function", "target": "m:f", "attributes": ["a", "b"]}],
        "train": {"objectives": [{"type": "clm"}]},
        "generate": {"sampling": {"max_tokens": 10}},
        "evaluate": {
            "methods": ["start", "reranking"], "candidates": 3, "samples": 2, "bootstrap": 100,
            "sampling": {"temperature": 0.0, "max_tokens": ROOM},
        } | more,
    }  # fmt: skip
    return config.parse(config.Job, raw, where="test")


class Plain:
    """Renders a conversation as one token per character, behind one per level; refuses those of 13 characters."""

    def render(self, messages, levels=None):
        if sum(len(m["content"]) for m in messages) == 13:
            raise DataError("its text reads as <|end|>")
        return [*(levels or ()), *("x" * sum(len(m["content"]) for m in messages))]


def prompt(size, split="eval", first="e"):
    messages = [{"role": "user", "content": first * size}]
    return {"prompt_id": schema.prompt_id(messages), "messages": messages, "source": "s", "split": split}


class FakePool:
    """Answers everything but what is longer than an engine of that context takes; one of the shortest prompt's ends engines."""

    asked, ends, now_s = (), 0, 0.0
    """Lengths of all prompts so far; the prompt of a call at which the user interrupts it; the time, 10 s for each answer."""

    def __init__(self, *_):
        self.weights_version = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def load_weights(self, folder):
        self.weights_version += 1

    def generate(self, prompts, sampling, batch_size, done):
        FakePool.asked += [len(p) for p in prompts]
        assert all(len(p) + sampling.max_tokens <= CONTEXT for p in prompts), "vLLM raises"
        deadly = next((p for p in prompts if p[:2] == [2, 2] and len(p) == 12), None)
        for i, p in enumerate(prompts):
            if FakePool.ends == (ends := i + 1):
                raise KeyboardInterrupt
            if p is not deadly:
                FakePool.now_s += 10
                done([i], [Completion("word", [1] * ends, -0.5, "stop", [-0.5])])

    def logp(self, contexts, answers, batch_size):
        return [-1.0] * len(answers)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Evaluate prompts of these sizes; no answer to that of size 20 can be scored."""
    scores, blind = {"a": 1.0, "b": 2.0}, prompt(20)["prompt_id"]
    monkeypatch.setattr(questions, "EnginePool", FakePool)
    monkeypatch.setattr(FakePool, "asked", [])
    monkeypatch.setattr(FakePool, "ends", 0)
    monkeypatch.setattr(FakePool, "now_s", 0.0)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: FakePool.now_s))

    def score(texts, chats, rewards, made, out, progress):
        bad = [t for t, (p, _) in texts.items() if p == blind]
        rows = [{"stage": "score", "row_id": t, "error": "no_rating", "detail": "the judge said nothing"} for t in bad]
        out.write_table(from_rows(rows, schema.QUARANTINE), "quarantine", "scores")
        return {t: scores for t in texts if t not in bad}

    monkeypatch.setattr(grid, "score_texts", score)
    out, scales = Storage(str(tmp_path / "out")), {n: Levels.fit([0.0, 1, 2, 3], 2) for n in ("a", "b")}

    def evaluated(*sizes, made=None):
        rows = [prompt(1, "train", "t"), *(prompt(s) for s in sizes)]
        given = evaluate.Inputs(from_rows(rows, schema.PROMPTS), scales, lambda: None, out.sub("train"))
        made = made or job()
        spec = EngineSpec("folder", "float32", CONTEXT, made.generate.engine)
        return evaluate.run(given, made, spec, Plain(), {"clm": "/clm", "exmate": "/exmate"}.get, out, Silent()).check("evaluate")

    evaluated.out = out
    return evaluated


# to each prompt: 2 answers of the start model, 3 candidates, 2 answers in each of 4 cells by the trained model
EACH = 2 + 3 + 8


def test_a_prompt_that_leaves_no_room_in_one_cell_is_asked_of_no_method(run, caplog):
    """154 + 2 codes + 100 are the whole context; 155 would fit without codes, and 246 even for reranking's 10 tokens."""
    result = run(10, 20, 154, 155, 246)
    assert result.rows_in == 5 * EACH and max(FakePool.asked) == 156 and len(FakePool.asked) == 3 * EACH
    assert result.quarantined == {DIED: 1, "prompt_too_long": 2 * EACH, "no_rating": EACH} and result.rows_out == 2 * EACH - 1
    bad = run.out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    long = {r["row_id"]: r["detail"] for r in bad if r["error"] == "prompt_too_long"}
    assert long.keys() == {prompt(s)["prompt_id"] for s in (155, 246)}
    assert long[prompt(155)["prompt_id"]] == "257 tokens with an answer, as clm is asked it, exceed model.max_context=256"
    assert set(run.out.read_table("grid", schema.grid(["a", "b"]))["prompt_id"].to_pylist()) == {
        prompt(s)["prompt_id"] for s in (10, 20, 154)
    }
    (line,) = [m for m in caplog.messages if "prompt_too_long" in m]
    assert min(long) in line and "exceed model.max_context=256, and 1 more with it" in line
    assert run(10, 20, 154, 155, 246) == result  # once more, from what is there


def test_prompts_that_are_all_too_long_are_an_error_with_the_next_step(run):
    with pytest.raises(DataError, match=r"evaluate: none of 2 prompts can be asked: 257 tokens .* or raise model\.max_context"):
        run(155, 246)


def test_a_prompt_that_the_renderer_refuses_is_set_aside_for_all_methods(run):
    result = run(10, 13, 154, 155)
    assert result.rows_in == 4 * EACH
    assert result.quarantined == {DIED: 1, "prompt_too_long": EACH, "special_tokens": EACH} and result.rows_out == 2 * EACH - 1
    bad = run.out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    special = [(r["row_id"], r["detail"]) for r in bad if r["error"] == "special_tokens"]
    assert special == [(prompt(13)["prompt_id"], "its text reads as <|end|>")]
    with pytest.raises(DataError, match="none of 1 prompts can be asked: its text reads as"):
        run(13)


def test_an_interrupted_method_goes_on_at_its_first_question_without_an_answer(run, monkeypatch):
    """Start model 2 answers, then reranking 3, of which 2 come; then the trained model's 8."""
    monkeypatch.setattr(FakePool, "ends", 3)
    with pytest.raises(KeyboardInterrupt):
        run(14)
    assert run.out.read_json("took", "reranking.json") == {"seconds": 20.0}
    answers = run.out.read_table("pieces/reranking", questions.answers_schema(job()))
    assert sorted(answers["num_tokens"].to_pylist()) == [1, 2] and len(FakePool.asked) == 2 + 3
    monkeypatch.setattr(FakePool, "ends", 0)
    result = run(14)
    assert result.rows_in == result.rows_out == EACH and len(FakePool.asked) == 2 + 3 + 1 + 8
    made = run.out.read_table("answers", questions.answers_schema(job())).to_pylist()
    assert [a["num_tokens"] for a in made if a["method"] == "reranking"] == [1, 2, 1]
    assert not run.out.names("pieces/reranking")
    assert run.out.read_json("took", "reranking.json") == {"seconds": 30.0} and result.facts["engines_s"] == 130.0
    assert run.out.exists("took", "drift.json")  # what likelihoods under the base took, for the benchmark of the pipeline
    spent = result.facts["spent"]
    # 10 s an answer: one of the start model's two, all three candidates, one of the trained model's eight
    assert spent["start"] == {"tokens": 1.5, "seconds": 10.0} and spent["reranking"] == {"tokens": 4.0, "seconds": 30.0}
    assert spent["clm"] == {"tokens": 4.5, "seconds": 10.0}


def test_an_interrupted_method_keeps_the_version_of_its_weights(run):
    """The second trained method is cut off; the rerun loads weights once, and still says that they are the second ones."""
    one = job(methods=[])
    two = one.model_copy(update={"train": one.train.model_copy(update={"objectives": [config.CLM(), config.ExMATE()]})})
    run(14, made=two)
    first = run.out.read_table("answers", questions.answers_schema(two))
    run.out.delete("answers")
    clm = first.filter(pc.equal(first["method"], "clm"))
    exmate = first.filter(pc.equal(first["method"], "exmate"))
    run.out.write_table(clm, "answers", "method-clm")
    run.out.sub("pieces").write_table(exmate.slice(0, 5), "exmate")
    run(14, made=two)
    again = run.out.read_table("answers", questions.answers_schema(two))
    assert set(again.filter(pc.equal(again["method"], "exmate"))["weights_version"].to_pylist()) == {2}


def test_answers_of_an_earlier_attempt_to_prompts_that_are_not_asked_any_more_do_not_count(run):
    first = run(10, 154)
    again = run(10)
    assert first.rows_in == 2 * EACH and again.rows_in == EACH and len(FakePool.asked) == 2 * EACH


@pytest.mark.parametrize("method", ["start", "reranking", "clm"])
def test_an_answer_that_is_not_there_stops_the_stage(run, method):
    run(10, 154)
    part = run.out.read_part("answers", f"method-{method}", questions.answers_schema(job()))
    run.out.write_table(part.slice(1), "answers", f"method-{method}")
    with pytest.raises(DataError, match=rf"evaluate: {2 * EACH} rows came in, .*: 1 are unaccounted for"):
        run(10, 154)
    run.out.write_table(pa.concat_tables([part, part.slice(0, 1)]), "answers", f"method-{method}")
    with pytest.raises(DataError, match=rf"evaluate: {2 * EACH} rows came in, .*: -1 are unaccounted for"):
        run(10, 154)


def test_an_answer_that_the_grid_lacks_stops_the_stage(run, monkeypatch):
    build = grid.build

    def leaky(*given):
        table, lost = build(*given)
        rows = table.to_pylist()
        at = next(i for i, r in enumerate(rows) if r["method"] == "clm" and r["score_a"] == 1.0)
        return from_rows(rows[:at] + rows[at + 1 :], table.schema), lost

    monkeypatch.setattr(grid, "build", leaky)
    with pytest.raises(DataError, match="1 are unaccounted for"):
        run(10, 154)


def test_a_set_s_prompts_are_measured_under_the_longest_instruction(tmp_path, run):
    """Level 10 is one character longer than level 1, and a prompt on the border fits under the one alone."""
    control = config.Control(attributes=(config.Attribute(name="a", levels=10),))
    space = ControlSpace.of(control)
    assert len(space.instruction((10,))) == len(space.instruction((1,))) + 1
    border = CONTEXT - ROOM - len(space.instruction((1,)))
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(json.dumps({"prompt": "q" * size}) for size in (border - 1, border)))
    wanted = {"name": "mine", "sources": [{"type": "file", "path": str(asked)}]}
    made = job(methods=["prompting"], sets=[wanted]).model_copy(update={"control": control})
    given = evaluate.Inputs(from_rows([], schema.PROMPTS), {}, lambda: None, run.out)
    (part,) = evaluate._sets(given, made, space.cells(None), space, Plain(), Storage(str(tmp_path)))
    assert [len(p["messages"][0]["content"]) for p in part.prompts] == [border - 1]
