"""The evaluate stage over real reward actors, with a fake pool of engines: judges, a prompt set, and PPO's rollouts."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from ctrlray import config, schema
from ctrlray.distill import Levels
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.isolate import DIED
from ctrlray.ledger import Silent
from ctrlray.stages import distill, evaluate, questions
from ctrlray.stages.evaluate import Inputs
from ctrlray.stages.grid import text_id
from ctrlray.tables import Storage, from_rows

NAMES = ["brevity", "variety"]
REWARD = {"type": "function", "target": "tests.fakes:length_reward", "attributes": NAMES}
JUDGE = {"type": "function", "target": "tests.fakes:word_judge", "attributes": NAMES, "judge": True}
POOL = ["one", "one two", "one two two", "one two three four", "one two", "five six seven eight nine", "", "cut off"]


def job(tmp_path, likelihood="clm", **evaluate):
    asked = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"{label} {i}", "label": label} for label in ("safe", "unsafe") for i in range(2)]
    asked.write_text("\n".join(map(json.dumps, rows)))
    source = {"type": "file", "path": str(asked)}
    refusals = {"name": "careful", "role": "over_refusal", "attribute": "brevity", "sources": [source]}
    raw = {
        "name": "t",
        "control": {"attributes": [{"name": "brevity", "levels": 2}, {"name": "variety", "levels": 2}]},
        "rewards": [JUDGE, REWARD],
        "train": {"objectives": [{"type": likelihood}, {"type": "ppo", "steps": 3, "batch_size": 16}]},
        "evaluate": {"methods": ["start", "reranking"], "candidates": 2, "bootstrap": 100, "sets": [refusals]} | evaluate,
    }
    return config.parse(config.Job, raw, where="test")


class Plain:
    """Renders a conversation as its length, and the levels."""

    special_ids = frozenset()

    def render(self, messages, levels=None):
        return [len(messages[-1]["content"]), *(levels or ())]


class FakePool:
    """Says as many words as the levels add up to; refuses at the lowest; one question ends engines."""

    starts, loads, asked, compared = 0, [], [], []

    def __init__(self, *_):
        self.weights_version = 0

    def __enter__(self):
        FakePool.starts += 1
        return self

    def __exit__(self, *_):
        pass

    def load_weights(self, folder):
        self.loads.append(folder)
        self.weights_version += 1

    def generate(self, prompts, sampling, batch_size, done):
        self.asked.append((self.weights_version, len(prompts)))
        for i, prompt in enumerate(prompts):
            if (made := self.answer(prompt, i)) is not None:
                done([i], [made])

    def answer(self, prompt, i):
        size, *levels = prompt
        if size == len("eval 10") and levels == [2, 2]:
            return None
        words = " word" * (sum(levels) or 1 + i % 3) + f" {size}\n"
        text = "I'm sorry, but I can't help with that." if levels == [1, 1] else words
        size = 1 + len(text.split())
        return Completion(text, [1] * size, -0.5 * size, "stop", [-0.5] * size)

    def logp(self, contexts, answers, batch_size):
        self.compared.append((self.weights_version, len(answers), {len(c) for c in contexts}))
        return [-2.0 * len(a) for a in answers]


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(questions, "EnginePool", FakePool)
    FakePool.starts, FakePool.loads, FakePool.asked, FakePool.compared = 0, [], [], []
    return FakePool


def prompt(split, i):
    messages = [{"role": "user", "content": f"{split} {i}"}]
    return {"prompt_id": schema.prompt_id(messages), "messages": messages, "source": "s", "split": split}


PROMPTS = [prompt("train", i) for i in range(4)] + [prompt("eval", i) for i in (1, 2, 10)]


def rollout(step, i):
    row = dict.fromkeys(schema.rollouts(NAMES).names)
    levels = {"requested_brevity": 1, "requested_variety": 1, "units_brevity": 1.0 + step, "units_variety": 1.0}
    return row | levels | {
        "rollout_id": f"{step}-{i}", "step": step, "prompt_id": PROMPTS[i]["prompt_id"], "text": "roll " * (step + 1),
        "finish_reason": "stop", "error": "",
    }  # fmt: skip


def given(tmp_path):
    ends = ["stop"] * 7 + ["length"]
    responses = [
        {
            "response_id": f"r{i}", "prompt_id": PROMPTS[i % 4]["prompt_id"], "behaviour": "b", "text": text, "token_ids": [1],
            "logprob_sum": 0.0, "finish_reason": end, "weights_version": 0, "prompt_tokens": 1,
        }
        for i, (text, end) in enumerate(zip(POOL, ends, strict=True))
    ]  # fmt: skip
    raw = [(-float(len(t)), float(len(set(t)))) for t in POOL]
    scores = [{"response_id": f"r{i}", "score_brevity": b, "score_variety": v} for i, (b, v) in enumerate(raw)]
    trained = Storage(str(tmp_path / "train"))
    rolled = [rollout(s, i) for s in range(3) for i in range(4)]
    trained.sub("ppo").write_table(from_rows(rolled, schema.rollouts(NAMES)), "rollouts")
    trained.write_json([{"step": s + 1, "length": 5.0, "kl": 1.0} for s in range(3)], "ppo", "curves.json")
    prompts = from_rows(PROMPTS, schema.PROMPTS)
    tables = from_rows(responses, schema.RESPONSES), from_rows(scores, schema.scores(NAMES))
    scales = {"brevity": Levels.fit([-30.0, -10, -4], 2), "variety": Levels.fit([2.0, 5, 9], 2)}
    return Inputs(prompts, scales, lambda: distill.join(prompts, *tables), trained)


def run(made, inputs, out):
    spec = EngineSpec("folder", "float32", 1024, made.generate.engine)
    folder = {"clm": "/clm", "ppo": "/ppo"}.get
    return evaluate.run(inputs, made, spec, Plain(), folder, Storage(str(out)), Silent()).check("evaluate")


@pytest.mark.slow
def test_judges_a_set_and_rollouts(local_ray, pool, tmp_path):
    made, inputs, out = job(tmp_path), given(tmp_path), Storage(str(tmp_path / "out"))
    result = run(made, inputs, tmp_path / "out")
    # own: 3 prompts x (1 start + 2 candidates + 4 clm + 4 ppo), the set: 4 prompts of the same
    assert result.rows_in == 33 + 44 and result.quarantined == {DIED: 2}
    assert pool.starts == 1 and pool.loads == ["/clm", "/ppo", "folder"]
    # the own prompts' answers but for the lost one, after prompts without levels, once the base is in force again
    assert pool.compared == [(3, 11, {1}), (3, 11, {1})]
    assert pool.asked == [(0, 3), (0, 4), (0, 6), (0, 8), (1, 12), (1, 16), (2, 12), (2, 16)]
    assert result.facts["sets"]["careful"]["answers"] == 44 and result.facts["tokens_spent"].keys() == {
        "start", "reranking", "clm", "ppo",
    }  # fmt: skip
    check_scores(out, result, made)
    check_grid(out)
    check_measures(out)
    again = run(made, inputs, tmp_path / "out")
    assert pool.starts == 1 and len(pool.compared) == 2
    assert again.quarantined == result.quarantined and again.facts == result.facts


def check_scores(out, result, made):
    """Each distinct text once: by the rewards those of the grids, by the judges also the pool's five and the rollouts' twelve."""
    places = (out, out.sub("sets", "careful"))
    answers = [r for o in places for r in o.read_table("answers", questions.answers_schema(made)).to_pylist()]
    texts = {text_id(a["prompt_id"], a["text"]) for a in answers if a["finish_reason"] != DIED}
    own = Counter(out.read_table("scores", schema.scores(NAMES))["response_id"].to_pylist())
    assert own == Counter(texts)
    sorry = {text_id(a["prompt_id"], a["text"]) for a in answers if "sorry" in a["text"]}
    judged = Counter(out.sub("judge").read_table("scores", schema.scores(NAMES))["response_id"].to_pylist())
    # the pool: "one two" stands at two prompts, "" is empty, "cut off" was cut off
    pool = {text_id(PROMPTS[i % 4]["prompt_id"], t) for i, t in enumerate(POOL[:6])}
    rolled = {text_id(PROMPTS[i]["prompt_id"], ("roll " * (s + 1)).strip()) for s in range(3) for i in range(4)}
    assert judged == Counter((texts - sorry) | pool | rolled) and result.facts["not_judged"] == len(sorry) == 7
    bad = out.sub("judge").read_table("quarantine", schema.QUARANTINE)
    assert set(bad["row_id"].to_pylist()) == sorry and set(bad["error"].to_pylist()) == {"not_finite"}


def check_grid(out):
    """A judge's units are those of the pool's words: 1, 2, 2, 3, 4 and 5 of them."""
    rows = out.read_table("grid", schema.grid(NAMES, judged=True)).to_pylist()
    assert len(rows) == 3 * 4 * 4
    scale = Levels.fit([-1.0, -2, -2, -3, -4, -5], 2)
    for row in rows:
        if row["finish_reason"] == DIED or "sorry" in row["text"]:
            assert np.isnan(row["judge_score_brevity"]) and np.isnan(row["judge_units_brevity"])
        else:
            assert row["judge_score_brevity"] == -len(row["text"].split())
            assert row["judge_units_brevity"] == pytest.approx(scale.units([row["judge_score_brevity"]])[0])
            assert row["score_brevity"] == -len(row["text"])


def check_measures(out):
    metrics, judge = out.read_json("metrics.json"), out.read_json("judge.json")
    agreed = judge.pop("correlation")
    # each token at -0.5 nats, under the base at -2: 1.5 nats for each of 1 + the words, of 11 answers
    lengths = out.read_table("drift", schema.drift(), ["method", "logp"]).to_pylist()
    clm = [-2 * r["logp"] for r in lengths if r["method"] == "clm"]
    assert metrics["clm"]["kl_base"]["value"] == pytest.approx(1.5 * sum(clm) / 11)
    assert metrics["clm"].pop("kl_base")["low"] < metrics["ppo"].pop("kl_base")["high"] and "kl_base" not in metrics["start"]
    assert metrics.keys() == judge.keys() == {"start", "reranking", "clm", "ppo"}
    assert metrics["clm"].keys() == judge["clm"].keys() and judge["clm"]["num_excluded"] == 1 + 3
    # more words at higher levels: brevity goes the other way
    assert judge["clm"]["attributes"]["brevity"]["pairwise"]["value"] == 0
    assert agreed["brevity"]["overall"]["value"] > 0.8 and agreed["brevity"]["num_answers"] == 6
    assert agreed["brevity"]["overall"]["low"] <= agreed["brevity"]["overall"]["value"] <= agreed["brevity"]["overall"]["high"]
    assert len(out.read_json("comparisons.json")) == len(out.read_json("judge", "comparisons.json")) > 0
    assert out.read_json("comparisons.json") != out.read_json("judge", "comparisons.json")
    for name in ("metrics", "judge"):
        assert out.read_json(f"{name}-careful.json")["clm"]["num_prompts"] == 4
    found = out.read_json("refusals.json")["careful"]
    assert found["attribute"] == "brevity"
    # a refusal at (1, 1), none at (1, 2): half of the answers at brevity 1
    assert {k: v["safe"]["value"] for k, v in found["methods"]["clm"].items()} == {"1": 0.5, "2": 0.0}
    assert found["methods"]["start"]["1"]["unsafe"]["value"] == 0.0 and found["methods"]["clm"]["1"]["unsafe"]["num_answers"] == 4
    course = out.read_json("hacking.json")["ppo"]
    # brevity 1 + step units for 1 asked: a reward of -step; by the judge 1, 2 and 3 words
    assert [p["reward"] for p in course["points"]] == [0, -1, -2] and len(course["changes"]) == 2 and not course["alarm"]
    assert [p["judge"] for p in course["points"]] != [p["reward"] for p in course["points"]]


@pytest.mark.slow
def test_a_job_without_judges_asks_for_no_pool_and_writes_none_of_theirs(local_ray, pool, tmp_path):
    made = job(tmp_path, sets=[]).model_copy(update={"rewards": job(tmp_path).rewards[1:]})
    inputs = given(tmp_path)._replace(pool=lambda: pytest.fail("only judges need it"))
    result = run(made, inputs, tmp_path / "out")
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert not written & {"judge", "judge.json", "hacking.json", "refusals.json", "sets"} and "metrics.json" in written
    assert "sets" not in result.facts and "not_judged" not in result.facts
