"""The score stage without Ray: what each reward sees of a row, what is written, and what is counted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from ctrlray import config, schema
from ctrlray.errors import ConfigError
from ctrlray.ledger import Silent
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

    def make(target="tests.fakes:length_reward", *names, keep_truncated=False):
        reward = config.FunctionReward(target=target, attributes=names or ("brevity",))
        return score.ScoreBatch(reward, CHATS, keep_truncated, Journal(Storage(str(tmp_path / "notes"))))

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


def test_each_row_is_written_once_by_what_became_of_it(tmp_path):
    out = Storage(str(tmp_path))
    rows = answers(
        text=["a", "b", "c"], raw_x=[1.0, 2.0, 3.0], raw_y=[10.0, 20.0, 30.0], error=["", "RuntimeError: it: broke", "truncated"]
    )
    score.WriteScores([("kind", {"x": 2.0, "y": -1.0})], out)(rows)
    assert out.read_table("scores", schema.scores(["kind"])).to_pylist() == [{"response_id": "r0", "score_kind": -8.0}]
    (bad,) = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert bad == {"stage": "score", "row_id": "r1", "error": "RuntimeError", "detail": "RuntimeError: it: broke"}


def finished_before(out, *ids, failed=()):
    out.write_table(from_rows([{"response_id": i, "score_brevity": 1.0} for i in ids], schema.scores(["brevity"])), "scores")
    bad = [{"stage": "score", "row_id": i, "error": "RuntimeError", "detail": "d"} for i in failed]
    out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine")


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
