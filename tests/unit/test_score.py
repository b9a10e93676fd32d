"""The score stage without Ray: what each reward sees of a row, what is written, and what is counted."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pytest

from ctrlray import config, schema
from ctrlray.errors import ClusterError, ConfigError, DataError
from ctrlray.ledger import Silent
from ctrlray.rewards import pool
from ctrlray.stages import score
from ctrlray.stages.journal import Journal
from ctrlray.tables import Storage, from_rows, slices

CHATS = {"p": [{"role": "user", "content": "q"}]}


def job(**extra):
    raw = {
        "name": "t",
        "control": {"attributes": [{"name": "brevity"}]},
        "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}],
    }
    return config.parse(config.Job, raw | extra, where="t")


def answers(**columns):
    count = len(columns["text"])
    return pa.table({"response_id": [f"r{i}" for i in range(count)], "prompt_id": ["p"] * count, **columns})


@pytest.fixture
def in_actor(monkeypatch, tmp_path):
    """A reward actor's callable in this process."""
    monkeypatch.setattr(score, "yield_to_engines", lambda: None)
    monkeypatch.setattr(score.ray, "get", lambda value: value)

    def make(target="tests.fakes:length_reward", *names, keep_truncated=False, max_restarts=10):
        reward = config.FunctionReward(target=target, attributes=names or ("brevity",))
        notes, out = Storage(str(tmp_path / "notes")), Storage(str(tmp_path / "out"))
        return score.ScoreBatch(reward, CHATS, keep_truncated, Journal(notes), max_restarts, out)

    return make


def test_a_second_reward_scores_what_the_first_could_and_keeps_its_errors(in_actor):
    rows = answers(text=["aa", "bad", "cccc"], raw_first=[1.0, 0.0, 2.0], error=["", "first: said no", ""])
    made = in_actor()(rows).to_pylist()
    assert [r["error"] for r in made] == ["", "first: said no", ""]
    assert (made[0]["raw_brevity"], made[2]["raw_brevity"]) == (-2.0, -4.0) and np.isnan(made[1]["raw_brevity"])
    assert [r["raw_first"] for r in made] == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("keep", [False, True])
def test_cut_off_answers_are_scored_only_when_the_job_keeps_them(in_actor, keep):
    rows = answers(text=["aa", "bb"], finish_reason=["length", "stop"])
    made = in_actor(keep_truncated=keep)(rows).to_pylist()
    assert [r["error"] for r in made] == ["" if keep else "truncated", ""]
    assert np.isnan(made[0]["raw_brevity"]) == (not keep) and made[1]["raw_brevity"] == -2.0


def test_a_reward_that_cannot_be_made_says_so_at_its_first_batch(in_actor):
    """In an actor's constructor the error would start the actor anew, and reach nobody in the end."""
    refused = in_actor("tests.fakes:absent")
    with pytest.raises(ConfigError, match=r"tests\.fakes:absent.*has no attribute .absent"):
        refused(answers(text=["aa"]))


@pytest.fixture
def dies(in_actor, monkeypatch):
    """Has an actor that dies at `kill` work on a batch, in process after process; gives how often it ended, and the batch."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)

    def work(rows, max_restarts, after=lambda deaths: None):
        for deaths in range(1000):
            try:
                return deaths, in_actor("tests.fakes:deadly_reward", max_restarts=max_restarts)(rows)
            except SystemExit:
                after(deaths + 1)
        pytest.fail("nobody ends this")

    return work


def test_rows_that_kill_are_in_the_quarantine_before_the_rest_of_their_batch_is_scored_and_there_once(dies, tmp_path):
    """16 rows, then eighths of two; 5 and 13 each end one with its neighbour and two alone."""
    out, seen = Storage(str(tmp_path / "out")), {}

    def look(deaths):
        seen[deaths] = out.read_table("quarantine", schema.QUARANTINE)["row_id"].to_pylist()

    rows = answers(text=["kill" if i in (5, 13) else f"answer {i}" for i in range(16)])
    deaths, made = dies(rows, max_restarts=1, after=look)
    assert deaths == 1 + 2 * 3 and seen[5] == [] and seen[6] == seen[7] == ["r5"]
    score.WriteScores([("brevity", {"brevity": 1.0})], out)(made)
    bad = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert sorted(b["row_id"] for b in bad) == ["r13", "r5"]
    assert {(b["stage"], b["error"]) for b in bad} == {("score", "process_died")}
    assert all(b["detail"].startswith("process_died: alone with it the reward's process ended: ") for b in bad)
    scored = out.read_table("scores", schema.scores(["brevity"]))["response_id"].to_pylist()
    assert sorted(scored) == sorted(f"r{i}" for i in range(16) if i not in (5, 13))


def test_a_reward_that_ends_on_everything_ends_the_stage_and_blames_no_row(dies, tmp_path):
    deaths = []
    said = r"ended 3 times in a row .*pool\.max_restarts=2 allows; .*without a word.*, and 0 rows"
    with pytest.raises(ClusterError, match=said):
        dies(answers(text=["kill"] * 16), max_restarts=2, after=deaths.append)
    assert deaths == [1, 2, 3] and not (tmp_path / "out" / "quarantine").exists()


def test_each_row_is_written_once_by_what_became_of_it(tmp_path):
    out = Storage(str(tmp_path))
    rows = answers(
        text=["a", "b", "c"], raw_x=[1.0, 2.0, 3.0], raw_y=[10.0, 20.0, 30.0], error=["", "RuntimeError: it: broke", "truncated"]
    )
    passed = score.WriteScores([("kind", {"x": 2.0, "y": -1.0})], out)(rows)
    assert passed.to_pylist() == [{"response_id": f"r{i}"} for i in range(3)]
    assert out.read_table("scores", schema.scores(["kind"])).to_pylist() == [{"response_id": "r0", "score_kind": -8.0}]
    (bad,) = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert bad == {"stage": "score", "row_id": "r1", "error": "RuntimeError", "detail": "RuntimeError: it: broke"}


def finished_before(out, *ids, failed=()):
    out.write_table(from_rows([{"response_id": i, "score_brevity": 1.0} for i in ids], schema.scores(["brevity"])), "scores")
    bad = [{"stage": "score", "row_id": i, "error": "RuntimeError", "detail": "d"} for i in failed]
    out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine")


def test_of_answers_with_their_tokens_the_driver_gets_only_how_many(tmp_path):
    rows = answers(text=["a", "b"], token_ids=[[1, 2, 3], []], raw_x=[1.0, 2.0], error=["", "RuntimeError: it"])
    passed = score.WriteScores([("kind", {"x": 1.0})], Storage(str(tmp_path)))(rows)
    assert passed.to_pylist() == [{"response_id": "r0", "num_tokens": 3}, {"response_id": "r1", "num_tokens": 0}]


def test_an_answer_with_scores_in_two_parts_stops_the_stage(tmp_path):
    out = Storage(str(tmp_path))
    for part in ("part-0", "part-late"):
        out.write_table(from_rows([{"response_id": "r0", "score_brevity": 1.0}], schema.scores(["brevity"])), "scores", part)
    with pytest.raises(DataError, match=r"1 rows are there more than once, among them r0 in .*part-0.*part-late"):
        score.run(answers(text=["a"], finish_reason=["stop"]), CHATS, job(), out, Silent())


def test_scored_and_failed_rows_start_no_actor_and_every_answer_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "score_stream", lambda *_: pytest.fail("everything is accounted for"))
    out = Storage(str(tmp_path))
    finished_before(out, "r0", "r1", "stranger", failed=("r1", "r2", "unknown"))  # r1 failed once and was scored later
    rows = answers(text=["a", "b", "c", "d"], finish_reason=["stop", "sentence", "stop", "length"])
    result = score.run(rows, CHATS, job(), out, Silent()).check("score")
    assert (result.rows_in, result.rows_out) == (4, 2)
    assert result.dropped == {"truncated": 1} and result.quarantined == {"RuntimeError": 1}
    assert result.facts == {"streamed_behind": "generate"}


def test_kept_truncated_answers_are_scored_and_not_dropped(tmp_path):
    out = Storage(str(tmp_path))
    finished_before(out, "r0", "r1")
    rows = answers(text=["a", "b"], finish_reason=["stop", "length"])
    result = score.run(rows, CHATS, job(distill={"keep_truncated": True}), out, Silent()).check("score")
    assert (result.rows_in, result.rows_out, result.dropped) == (2, 2, {})


@pytest.mark.parametrize("stored", [False, True])
def test_only_unscored_answers_go_to_the_rewards(tmp_path, monkeypatch, stored):
    seen = []
    monkeypatch.setattr(score, "score_stream", lambda stream, *_: stream)
    monkeypatch.setattr(score.ray.data, "from_arrow", lambda blocks: blocks)
    monkeypatch.setattr(score, "consume", lambda blocks, *_: seen.extend(r for b in blocks for r in b.to_pylist()))
    out = Storage(str(tmp_path))
    finished_before(out, "r0", failed=("r1",))
    rows = answers(text=["a", "b", "c", "d"], finish_reason=["stop", "stop", "stop", "length"])
    if stored:
        there = Storage(str(tmp_path / "generate"))
        for i, part in enumerate(slices(from_rows(rows.to_pylist(), schema.RESPONSES), 2)):
            there.write_table(part, "responses", f"part-{i}")
    result = score.run(there if stored else rows, CHATS, job(), out, Silent())
    assert seen == [{"response_id": "r2", "prompt_id": "p", "text": "c"}] and result.facts == {}
    assert (result.rows_in, result.rows_out, result.dropped) == (4, 1, {"truncated": 1})


def test_a_row_that_fails_alone_gives_its_own_reason():
    class Scorer:
        attributes = ("a", "b")

        def __call__(self, chats, texts):
            if "bad" in texts:
                raise ValueError("bad is bad" if len(texts) == 1 else "some row is bad")
            return {"a": np.full(len(texts), 1.0), "b": np.array([float(t) for t in texts])}

    columns, errors = score.score_rows(Scorer(), [CHATS["p"]] * 4, ["2", "bad", "inf", "3"])
    assert errors == ["", "ValueError: bad is bad", "not_finite: b is inf", ""]
    assert columns["b"][[0, 3]].tolist() == [2.0, 3.0]


def test_each_reward_keeps_notes_of_its_own(tmp_path):
    two = [{"type": "function", "target": "m:f", "attributes": ["brevity"]}]
    two.append({"type": "function", "target": "m:g", "attributes": ["other"]})
    first, second = score.journals(job(rewards=two).rewards, Storage(str(tmp_path)))
    with pytest.raises(SystemExit):
        first.run(["a"], lambda group: (_ for _ in ()).throw(SystemExit))
    assert len(first.in_flight()) == 1 and second.in_flight() == []


def test_weights_that_leave_float32_quarantine_the_row(tmp_path):
    rows = answers(text=["a", "b"], raw_x=pa.array([1.0, 1e20], pa.float32()), error=["", ""])
    score.WriteScores([("brevity", {"x": 1e25})], Storage(str(tmp_path)))(rows)
    kept = Storage(str(tmp_path)).read_table("scores", schema.scores(["brevity"]))["response_id"].to_pylist()
    (bad,) = Storage(str(tmp_path)).read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert kept == ["r0"] and (bad["row_id"], bad["error"]) == ("r1", "not_finite") and "lower the weights" in bad["detail"]


def test_a_module_that_raises_while_it_is_imported_is_the_setting_s_fault(in_actor, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"broken_rewards:f.*no licence"):
        in_actor("broken_rewards:f")(answers(text=["a"]))


def test_a_reward_s_model_is_named_as_the_job_has_it(monkeypatch, tmp_path):
    """The second of three, of which the first is a judge."""
    made = job(
        rewards=[
            {"type": "function", "target": "tests.fakes:length_reward", "attributes": ["charm"], "judge": True},
            {"type": "hf", "model": str(tmp_path), "attributes": ["charm"]},
            {"type": "embedded", "model": str(tmp_path), "heads": str(tmp_path / "heads")},
        ],
        control={"attributes": [{"name": "charm", "levels": 2}]},
    )
    assert made.places(made.teachers) == ["rewards.1", "rewards.2"] and made.places(made.judges) == ["rewards.0"]
    actors = []

    class Rows:
        def map_batches(self, kind, fn_constructor_args, **_):
            actors.append((kind, fn_constructor_args))
            return self

    for module in (score, pool):
        monkeypatch.setattr(module, "yield_to_engines", lambda: None)
    monkeypatch.setattr(score.ray, "put", lambda value: value)
    monkeypatch.setattr(score.ray, "get", lambda value: value)
    score.score_stream(Rows(), made, made.teachers, CHATS, Storage(str(tmp_path / "out")))
    for number, (kind, arguments), place in zip((1, 2), actors[:2], made.places(made.teachers), strict=True):
        said = rf"^rewards\.{number}\.model='{tmp_path}': no config\.json"
        with pytest.raises(ConfigError, match=said):
            kind(*arguments)(answers(text=["a"]))
        with pytest.raises(ConfigError, match=said):
            pool.RewardHost(made.rewards[number], place).ready()
