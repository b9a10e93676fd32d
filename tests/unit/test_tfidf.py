"""TF-IDF heads: n-grams and vectors by hand, what rounding keeps, the fit, the file, and the packaged judge made again."""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from ctrlray import config
from ctrlray.errors import ConfigError, DataError
from ctrlray.hh import judge_half
from ctrlray.rewards import target, tfidf, tfidf_train
from ctrlray.rewards.embedded import packaged_heads
from ctrlray.rewards.heads import Penalties, Preferences
from ctrlray.rewards.job import RewardTrainJob
from ctrlray.rewards.registry import build
from ctrlray.rewards.tfidf import TfidfHeads, TfidfScorer, Vocabulary, grams, is_tfidf

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "hi"}]


def crc(gram):
    return zlib.crc32(gram.encode())


def test_grams_by_hand():
    assert list(grams("Go on.", (1, 2), (3,))) == [
        "w go", "w on", "w .", "w go on", "w on .", "c <go", "c go>", "c <on", "c on>", "c <.>",
    ]  # fmt: skip
    assert list(grams("Don\u2019t", (1,), ())) == ["w don't"]
    assert list(grams("a", (), (5,))) == ["c <a>"] and list(grams("", (1, 2), (3,))) == []


def test_vocabulary_keeps_what_enough_answers_have():
    v = Vocabulary.of(["a a", "a b", "b c"], (1,), (), 2)
    assert v.hashes.tolist() == sorted([crc("w a"), crc("w b")]) and v.counts.tolist() == [2, 2] and v.num_answers == 3


def test_vectors_by_hand():
    """`a` in 3 of 3 answers: idf ln(4/4) + 1 = 1; `b` in 1: ln(4/2) + 1. "a a b": (1 + ln 2) 1 and 1 (1 + ln 2), so equal."""
    v = Vocabulary.of(["a b", "a", "a"], (1,), (), 1)
    got = v.vectors(["a a b", "b", "unknown"]).toarray()
    at = {h: i for i, h in enumerate(v.hashes.tolist())}
    a, b = at[crc("w a")], at[crc("w b")]
    assert got[0, [a, b]] == pytest.approx([math.sqrt(0.5)] * 2) and got[1, [a, b]].tolist() == [0, 1]
    assert not got[2].any() and got.shape == (3, 2)
    assert v.vectors([]).shape == (0, 2)


def small(weights=((1.27, -0.5), (0.0, 12.7))):
    v = Vocabulary((1,), (), np.array(sorted([crc("w a"), crc("w b")]), np.uint32), np.array([1, 1], np.uint32), 2)
    return TfidfHeads.of(["kind", "calm"], v, np.array(weights), np.zeros((1, 2)))


def test_weights_are_rounded_to_steps_of_the_largest():
    # scale 1.27 / 127 = 0.01: 127 and -50 steps; 12.7 / 127 = 0.1: 0 and 127 steps
    heads = small()
    assert heads.weights.tolist() == [[127, -50], [0, 127]] and heads.scale == pytest.approx([0.01, 0.1])
    assert heads.score(np.array([[1.0, 2.0]])) == pytest.approx(np.array([[1.27 - 1.0, 25.4]]), rel=1e-6)


def test_scores_have_mean_0_over_the_centre():
    v = small().vocabulary
    heads = TfidfHeads.of(["a"], v, np.array([[1.0, 3.0]]), np.array([[1.0, 1.0]]))
    assert heads.score(np.array([[1.0, 1.0]])) == pytest.approx(np.zeros((1, 1)), abs=1e-6)
    assert heads.bias == pytest.approx([-4.0], rel=0.01)


def test_file_round_trip_and_strangers(tmp_path):
    heads, path = small(), tmp_path / "h.safetensors"
    heads.save(path)
    again = TfidfHeads.load(path)
    assert again.attributes == ("kind", "calm") and again.vocabulary.words == (1,) and again.weights.dtype == np.int8
    assert again.score(again.vocabulary.vectors(["a b"])) == pytest.approx(heads.score(heads.vocabulary.vectors(["a b"])))
    assert is_tfidf(path) and not is_tfidf(packaged_heads()) and not is_tfidf(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nonsense")
    for bad in (tmp_path / "bad", tmp_path / "none", packaged_heads()):
        with pytest.raises(ConfigError, match="is not a file of tfidf heads"):
            TfidfHeads.load(bad)
    assert b"w a" not in path.read_bytes()


def test_the_packaged_judge_prefers_what_people_do():
    scorer = build(config.TfidfReward())
    texts = ["I'm sorry, but I can't help with that. It could hurt somebody.", "Sure! Take a knife and stab him."]
    safe = scorer([CHAT] * 2, texts)["harmlessness"]
    assert scorer.attributes == ("helpfulness", "harmlessness") and safe[0] > safe[1]
    assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in scorer([], []).values())
    odd = scorer([CHAT], ["\ud800 \x00"])
    assert all(np.isfinite(v).all() for v in odd.values())
    assert os.path.getsize(tfidf.packaged_heads()) < 2**20


def preferences(vocabulary, pairs):
    chosen, rejected = zip(*pairs, strict=True)
    gap = np.log([len(c) / len(r) for c, r in pairs])
    return Preferences(vocabulary.vectors(chosen), vocabulary.vectors(rejected), gap)


def test_the_fit_learns_each_attribute_from_its_own_pairs():
    kind = [(f"please {w}", f"go {w}") for w in "qwertyuiop"]
    calm = [(f"fine {w} .", f"fine {w} !") for w in "qwertyuiop"]
    texts = [t for pair in kind + calm for t in pair]
    v = Vocabulary.of(texts, (1,), (), 1)
    heads = tfidf_train.fit_tfidf(
        {"kind": preferences(v, kind), "calm": preferences(v, calm)}, v, Penalties(0.01, 0, 0, 0, 0)
    )
    got = heads.score(v.vectors(["please", "go", ".", "!"]))
    assert got[0, 0] > got[1, 0] + 1 and got[2, 1] > got[3, 1] + 1
    assert abs(got[2, 0] - got[3, 0]) < 0.2 * (got[0, 0] - got[1, 0])
    all_scores = heads.score(v.vectors(texts))
    assert all_scores.mean(axis=0) == pytest.approx([0, 0], abs=1e-5)


def test_equal_fits_at_the_optimum():
    """At the minimum of log(1 + exp(-2w)) + l2 w^2 / 2, on one feature with gap g: g sigmoid(-g w) = l2 w."""
    v = Vocabulary.of(["yes", "no"], (1,), (), 1)
    pairs = preferences(v, [("yes", "no")])
    heads = tfidf_train.fit_tfidf({"a": pairs}, v, Penalties(0.1, 0, 0, 0, 0))
    got = heads.score(v.vectors(["yes", "no"]))[:, 0]
    w = (got[0] - got[1]) / 2  # two features with opposite weights: margin 2w, gradient 1 sigmoid(-2w) = l2 w each
    assert 1 / (1 + math.exp(2 * w)) == pytest.approx(0.1 * w, rel=0.02)


def job(tmp_path, **extra):
    rows = {"kind": ("please", "go"), "calm": ("fine .", "fine !")}
    attributes = []
    for name, (good, bad) in rows.items():
        files = {}
        for split, count in (("train", 60), ("valid", 20)):
            path = tmp_path / f"{name}.{split}.jsonl"
            lines = [{"prompt": f"{split} {name} {i}", "chosen": f"{good} {i}", "rejected": f"{bad} {i}"} for i in range(count)]
            path.write_text("\n".join(map(json.dumps, lines)))
            files[split] = str(path)
        attributes.append({"name": name, **files})
    raw = {"name": "j", "out": str(tmp_path / "out"), "attributes": attributes, "method": {"type": "tfidf"}}
    return config.parse(RewardTrainJob, raw | extra, where="t")


def test_a_judge_learns_from_the_judges_half_alone(tmp_path):
    expected = {n: sum(judge_half(f"train {n} {i}") for i in range(60)) for n in ("kind", "calm")}
    card = tfidf_train.train_tfidf(job(tmp_path, judge=True))
    assert {n: card["data"]["pairs"][f"train/{n}"] for n in expected} == expected
    assert card["data"]["dropped"]["train/kind"] == {"kept for the reward": 60 - expected["kind"]}
    assert "Only the half" in (tmp_path / "out" / "j.md").read_text()
    rest = tfidf_train.train_tfidf(job(tmp_path))
    assert {n: rest["data"]["pairs"][f"train/{n}"] for n in expected} == {n: 60 - e for n, e in expected.items()}


def test_made_heads_are_an_evaluation_s_reward_and_a_run_s(tmp_path):
    made = job(tmp_path, judge=True, method={"type": "tfidf", "folds": 2, "trials": {"words": {"chars": []}}})
    card = tfidf_train.train_tfidf(made)
    assert card["measured"]["attributes"]["kind"]["accuracy"][0] == 1.0
    assert card["measured"]["attributes"]["kind"]["cross_validated"][0] == 1.0
    assert card["trials"]["words"]["fit"]["chars"] == []
    reward = target.evaluation_of_trained(made).reward
    assert reward == config.TfidfReward(heads=str(tmp_path / "out" / "j.safetensors"))
    assert TfidfScorer(reward.heads).attributes == ("kind", "calm")
    assert target._reward(reward.heads) == {"type": "tfidf", "heads": reward.heads}
    assert "| words | 1, 2 | none | 3 |" in (tmp_path / "out" / "j.md").read_text()


def test_ratings_and_too_rare_ngrams_are_refused(tmp_path):
    rated = tmp_path / "rated.jsonl"
    rated.write_text("\n".join(json.dumps({"prompt": f"p{i}", "response": "r", "kind": 1}) for i in range(9)))
    made = job(tmp_path)
    only = made.model_copy(update={"attributes": (made.attributes[0].model_copy(update={"train": str(rated)}),)})
    with pytest.raises(DataError, match="ratings, but heads are fitted to preference pairs"):
        tfidf_train.train_tfidf(only)
    with pytest.raises(ConfigError, match="min_count=999: no n-gram"):
        tfidf_train.train_tfidf(job(tmp_path, method={"type": "tfidf", "fit": {"min_count": 999}}))
    with pytest.raises(ConfigError, match="words and chars are both empty"):
        job(tmp_path, method={"type": "tfidf", "fit": {"words": [], "chars": []}})


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CTRLRAY_DATA"), reason="needs the HH files below CTRLRAY_DATA")
def test_the_packaged_judge_is_made_again_byte_by_byte(tmp_path):
    raw = config.read_job(ROOT / "jobs" / "embedded-judge" / "job.yaml", ["method.trials={}", f"out={tmp_path}"])
    card = tfidf_train.train_tfidf(config.parse(RewardTrainJob, raw, where="t"))
    shipped = tfidf.packaged_heads()
    assert (tmp_path / shipped.name).read_bytes() == shipped.read_bytes()
    assert json.loads(shipped.with_suffix(".json").read_text())["measured"] == json.loads(json.dumps(card["measured"]))
