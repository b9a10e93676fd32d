"""Generation and scoring over real Ray actors, with a fake engine in place of vLLM."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from ctrlray import config, models, schema
from ctrlray.cli import _root_cause
from ctrlray.control import ControlSpace
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.errors import ClusterError
from ctrlray.ledger import Silent
from ctrlray.stages import generate, score
from ctrlray.tables import Storage, from_rows
from tests.fakes import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SPACE = ControlSpace((config.Attribute(name="brevity", levels=2), config.Attribute(name="variety", levels=2)))


class FakeEngine:
    """Answers with the length of the prompt, slowly."""

    weights_version = 0

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def generate(self, prompts, sampling, max_tokens):
        time.sleep(0.5)
        ends = ["stop" if i % 5 else "length" for i in range(len(prompts))]
        texts = [f"answer {len(p)} {i}" for i, p in enumerate(prompts)]
        return [[Completion(text, [1, 2, 3], -1.0, end, [])] for text, end in zip(texts, ends, strict=True)]

    def decode(self, ids):
        return "Sorry."


class PatientEngine(FakeEngine):
    """Gives the fifth batch when there is a score in the folder that it has for a model, or after a minute."""

    asked = 0

    def generate(self, prompts, sampling, max_tokens):
        self.asked += 1
        end = time.monotonic() + 60
        while self.asked == 5 and not any(Path(self.spec.model).glob("*.parquet")) and time.monotonic() < end:
            time.sleep(0.05)
        return super().generate(prompts, sampling, max_tokens)


class FakeSpec(EngineSpec):
    """A recipe of fake engines."""

    def environment(self):
        return {}

    def build(self):
        return FakeEngine(self)


class PatientSpec(FakeSpec):
    def build(self):
        return PatientEngine(self)


class MortalEngine(FakeEngine):
    """Its process ends, without a word, at prompts of question 7 under behaviour `b`."""

    def generate(self, prompts, sampling, max_tokens):
        if any(b"question 7<" in bytes_of(p) and b"No." in bytes_of(p) for p in prompts):
            os._exit(1)
        return super().generate(prompts, sampling, max_tokens)


def bytes_of(ids):
    return TOKENIZER.decode(ids).encode()


class MortalSpec(FakeSpec):
    def build(self):
        return MortalEngine(self)


class BrokenEngine(FakeEngine):
    """Its process ends, without a word, whatever it is asked."""

    def generate(self, prompts, sampling, max_tokens):
        os._exit(1)


class BrokenSpec(FakeSpec):
    def build(self):
        return BrokenEngine(self)


class StillbornSpec(FakeSpec):
    """Its process ends, without a word, before there is an engine."""

    def build(self):
        os._exit(1)


def job(**extra):
    raw = {
        "name": "t",
        "control": {"attributes": [{"name": "brevity", "levels": 2}, {"name": "variety", "levels": 2}]},
        "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity", "variety"]}],
        "generate": {"samples": 4, "batch_size": 8, "behaviours": [{"name": "a"}, {"name": "b", "system": "s", "prefix": "No."}]},
    }
    return config.parse(config.Job, raw | extra, where="test")


@pytest.fixture
def prompts():
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}], "source": "s", "split": "train"} for i in range(16)]
    return from_rows([r | {"prompt_id": schema.prompt_id(r["messages"])} for r in rows], schema.PROMPTS)


@pytest.fixture
def base(tiny, private_cache):
    return models.prepare(config.Model(name=str(tiny)), SPACE, ["hello there"])


def sample(job, prompts, base, out, then=None, kind=FakeSpec):
    spec = kind(base.folder, "float32", 1024, job.generate.engine)
    renderer = base.renderer(SPACE)
    patience = generate.patience("generate", job.cluster.stall_timeout_s, generate.journals(out))
    return generate.run(prompts, job.generate, spec, renderer, "f", out, Silent(), patience, then).check("generate")


def test_requests_by_hand(prompts, base):
    made, refused = generate.expand_requests(prompts, job().generate, base.renderer(SPACE), "f", 1000)
    assert made.num_rows == 64 and refused.num_rows == 0
    first = made.to_pylist()[:4]
    assert [(r["behaviour"], r["sample"]) for r in first] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert first[0]["response_id"] == schema.response_id(first[0]["prompt_id"], "a", 0, "f")
    assert bytes(first[1]["prefix_token_ids"]) and not first[0]["prefix_token_ids"]
    _, refused = generate.expand_requests(prompts, job().generate, base.renderer(SPACE), "f", 40)
    assert set(refused["error"].to_pylist()) == {"prompt_too_long"}


def test_scores_stream_behind_generation(local_ray, prompts, base, tmp_path):
    """The first score is on storage before half of the answers are."""
    made, gen, sc = job(), Storage(str(tmp_path / "g")), Storage(str(tmp_path / "s"))
    chats = {p["prompt_id"]: p["messages"] for p in prompts.to_pylist()}
    scores = str(tmp_path / "s" / "scores")

    def behind(stream):
        return score.score_stream(stream, made, made.teachers, chats, sc)

    result = sample(made, prompts, base, gen, behind, kind=lambda folder, *rest: PatientSpec(scores, *rest))
    assert result.rows_out == 64
    answered = sorted(p.stat().st_mtime for p in (tmp_path / "g" / "responses").glob("*.parquet"))
    scored = sorted(p.stat().st_mtime for p in (tmp_path / "s" / "scores").glob("*.parquet"))
    assert len(answered) == len(scored) == 8
    assert scored[0] < answered[4]
    responses = gen.read_table("responses", schema.RESPONSES)
    accounts = score.run(responses, chats, made, sc, Silent()).check("score")
    assert accounts.rows_out == 64 - accounts.dropped["truncated"]
    prefixed = [r for r in responses.to_pylist() if r["behaviour"] == "b"]
    assert all(r["text"].startswith("Sorry.") and len(r["token_ids"]) == 6 for r in prefixed)


@pytest.mark.slow
def test_rows_that_kill_engines_are_set_aside_and_the_rest_goes_on(local_ray, prompts, base, tmp_path):
    made, out = job(), Storage(str(tmp_path))
    result = sample(made, prompts, base, out, kind=MortalSpec)
    assert result.rows_out == 62 and result.quarantined == {"process_died": 2}
    guilty = schema.prompt_id([{"role": "user", "content": "question 7"}])
    bad = {r["row_id"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    requests = generate.expand_requests(prompts, made.generate, base.renderer(SPACE), "f", 1000)[0].to_pylist()
    assert bad == {r["response_id"] for r in requests if r["prompt_id"] == guilty and r["behaviour"] == "b"}
    answered = out.read_table("responses", schema.RESPONSES)["response_id"].to_pylist()
    assert len(set(answered)) == len(answered) == 62
    assert sample(made, prompts, base, out).rows_out == 62  # they are not tried again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "last"),
    [(BrokenSpec, "the process ended without a word"), (StillbornSpec, "the process ended before it took up work")],
)
def test_an_engine_that_ends_on_everything_ends_the_stage(local_ray, prompts, base, tmp_path, kind, last):
    """Eight rows, then, in the only restart, the first of them alone; or none at all."""
    made, out = job(), Storage(str(tmp_path))
    once = made.generate.pool.model_copy(update={"max_restarts": 1})
    made = made.model_copy(update={"generate": made.generate.model_copy(update={"pool": once})})
    with pytest.raises(Exception) as caught:
        sample(made, prompts, base, out, kind=kind)
    error = _root_cause(caught.value)
    assert isinstance(error, ClusterError)
    text = str(getattr(error, "cause", None) or error)
    assert "ended 2 times in a row" in text and "pool.max_restarts=1 allows" in text and last in text and "0 rows" in text
    assert out.read_table("responses", schema.RESPONSES).num_rows == 0
    assert out.read_table("quarantine", schema.QUARANTINE).num_rows == 0
    assert sample(made, prompts, base, out).rows_out == 64  # once it is mended the same command goes on


@pytest.mark.slow
def test_restart_samples_only_what_is_missing(local_ray, prompts, base, tmp_path):
    made, gen = job(), Storage(str(tmp_path))
    sample(made, prompts, base, gen)
    ids = sorted(gen.read_table("responses", schema.RESPONSES)["response_id"].to_pylist())
    lost, *kept = sorted((tmp_path / "responses").glob("*.parquet"))
    before = {p: p.stat().st_mtime_ns for p in kept}
    lost.unlink()
    assert sample(made, prompts, base, gen).rows_out == 64
    again = gen.read_table("responses", schema.RESPONSES)["response_id"].to_pylist()
    assert sorted(again) == ids and max(Counter(again).values()) == 1
    assert all(p.stat().st_mtime_ns == before[p] for p in kept)


def test_failing_rewards_quarantine_their_rows_only(local_ray, tmp_path):
    faulty = [{"type": "function", "target": "tests.fakes:faulty_reward", "attributes": ["brevity"]}]
    made = job(control={"attributes": [{"name": "brevity", "levels": 2}]}, rewards=faulty)
    texts = ["fine", "nan", "boom", "also fine"]
    rows = pa.table(
        {"response_id": [str(i) for i in range(4)], "prompt_id": ["p"] * 4, "text": texts, "finish_reason": ["stop"] * 4}
    )
    out = Storage(str(tmp_path))
    result = score.run(rows, {"p": [{"role": "user", "content": "q"}]}, made, out, Silent()).check("score")
    assert result.rows_out == 2 and result.quarantined == {"RuntimeError": 1, "not_finite": 1}
    details = {r["row_id"]: r["detail"] for r in out.read_table("quarantine", schema.QUARANTINE).to_pylist()}
    assert "cannot read boom" in details["2"] and "brevity is nan" in details["1"]
    scores = out.read_table("scores", schema.scores(["brevity"])).to_pylist()
    assert {r["response_id"]: r["score_brevity"] for r in scores} == {"0": 4.0, "3": 9.0}


def test_weighted_outputs_add_up(local_ray, tmp_path):
    made = job(control={"attributes": [{"name": "both", "levels": 2, "score": {"brevity": 0.5, "variety": 2.0}}]})
    rows = pa.table({"response_id": ["a"], "prompt_id": ["p"], "text": ["aab"], "finish_reason": ["stop"]})
    out = Storage(str(tmp_path))
    score.run(rows, {"p": [{"role": "user", "content": "q"}]}, made, out, Silent()).check("score")
    (row,) = out.read_table("scores", schema.scores(["both"])).to_pylist()
    assert row["score_both"] == pytest.approx(0.5 * -3 + 2.0 * 2)


@pytest.mark.slow
def test_a_row_that_kills_reward_actors_is_quarantined_alone(local_ray, tmp_path):
    deadly = [{"type": "function", "target": "tests.fakes:deadly_reward", "attributes": ["brevity"]}]
    made = job(control={"attributes": [{"name": "brevity", "levels": 2}]}, rewards=deadly)
    texts = [f"answer {i}" for i in range(20)]
    texts[13] = "kill"
    rows = pa.table(
        {"response_id": [str(i) for i in range(20)], "prompt_id": ["p"] * 20, "text": texts, "finish_reason": ["stop"] * 20}
    )
    out = Storage(str(tmp_path))
    result = score.run(rows, {"p": [{"role": "user", "content": "q"}]}, made, out, Silent()).check("score")
    assert result.rows_out == 19 and result.quarantined == {"process_died": 1}
    (bad,) = out.read_table("quarantine", schema.QUARANTINE).to_pylist()
    assert bad["row_id"] == "13" and bad["stage"] == "score"
    scores = {r["response_id"]: r["score_brevity"] for r in out.read_table("scores", schema.scores(["brevity"])).to_pylist()}
    assert scores == {str(i): float(len(t)) for i, t in enumerate(texts) if i != 13}
