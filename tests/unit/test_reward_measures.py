"""What `reward evaluate` measures, by hand, and how it reads what it is given."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctrlray.errors import ConfigError
from ctrlray.hh import Pair
from ctrlray.rewards import measure
from ctrlray.rewards.data import Labels, Rated
from ctrlray.rewards.evaluate import Scored, card_text, measure_source, outputs_of
from ctrlray.rewards.job import RewardEvaluateJob
from ctrlray.rewards.target import evaluation_of


def asked(text):
    return ({"role": "user", "content": text},)


def test_length_only_takes_the_better_rule():
    # the longer of two won once, the shorter three times, one tie: 1.5 against 3.5 of 5
    found, rule = measure.length_only(np.array([1.0, -1, -2, -3, 0]))
    assert rule == "shorter wins" and found[0] == pytest.approx(0.7)


def test_calibration_by_hand():
    # |margins| ln 3, ln 3, 0 and ln 19 give the favourite 0.75, 0.75, 0.5 and 0.95; it won, lost, tied and won
    margins = np.array([math.log(3), -math.log(3), 0.0, math.log(19)])
    found = measure.calibration(margins, bins=5)
    rows = [(round(b["low"], 6), b["count"], round(b["predicted"], 6), b["observed"][0]) for b in found["bins"]]
    assert rows == [(0.5, 1, 0.5, 0.5), (0.7, 2, 0.75, 0.5), (0.9, 1, 0.95, 1.0)]
    # (1 * 0 + 2 * 0.25 + 1 * 0.05) / 4
    assert found["ece"] == pytest.approx(0.1375)
    # -log of 3/4, 1/4, 1/2, 19/20
    assert found["log_loss"] == pytest.approx(-np.log([0.75, 0.25, 0.5, 0.95]).mean())


def test_calibration_error_is_small_where_margins_are_the_truth():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    won = rng.random(20_000) < 1 / (1 + np.exp(-margins))
    assert measure.calibration(np.where(won, margins, -margins), bins=10)["ece"] < 0.01
    assert measure.calibration(np.where(won, margins, -margins) * 3, bins=10)["ece"] > 0.05  # too sure of itself


def test_a_margin_beyond_float_range_is_certain():
    assert measure.calibration(np.array([1e5, -1e5]), bins=5)["bins"][0]["predicted"] == 1.0


def test_spearman_by_hand():
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * (1 + 1) / (4 * 15) = 0.8, whatever the monotone scale
    found = measure.spearman(np.array([1.0, 2, 3, 4]), np.exp([1.0, 3, 2, 4]), np.arange(4), seed=0)
    assert found[0] == pytest.approx(0.8) and found[1] <= 0.8 <= found[2]


def test_mean_has_an_interval_over_prompts():
    rng = np.random.default_rng(1)
    per_prompt = rng.normal(size=50)
    values, groups = np.repeat(per_prompt, 20), np.repeat(np.arange(50), 20)
    value, low, high = measure.mean(values, groups, seed=0)
    assert value == pytest.approx(per_prompt.mean())
    # 20 copies of one answer say no more than one: +-1.96 / sqrt(50)
    assert high - low == pytest.approx(2 * 1.96 * per_prompt.std() / math.sqrt(50), rel=0.15)


def test_pairs_by_hand():
    """Three pairs of two prompts; one answer could not be scored, so its pair does not count."""
    pairs = (Pair(asked("a"), "good", "bad!"), Pair(asked("a"), "fine", "poor"), Pair(asked("b"), "x", "y"))
    labels = Labels("pairs", pairs, (), {"unparsable": 1})
    scores = {"kind": np.array([2.0, 1, 0, 3, np.nan, 1]), "curt": np.array([0.0, 1, 1, 0, 1, 0])}
    scored = Scored(scores, np.array([3.0, 1, 1, 2, 1, 1]), np.array([0, 0, 0, 0, 1, 1]))
    found = measure_source(labels, scored, "kind", bins=5, seed=0)
    assert found["accuracy"][0] == pytest.approx(1 / 2)  # 2 > 1, 0 < 3
    assert found["length_only"][0] == pytest.approx(1 / 2)  # 3 > 1, 1 < 2
    assert found["accuracy_of_others"]["curt"][0] == pytest.approx(2 / 3)
    assert sum(b["count"] for b in found["calibration"]["bins"]) == 2
    # within prompt a: scores 2 1 0 3 and lengths 3 1 1 2 less their means, 1.5 + 0.25 + 1.125 + 0.375 ... = 2.5
    kind, length = np.array([0.5, -0.5, -1.5, 1.5]), np.array([1.25, -0.75, -0.75, 0.25])
    want = kind @ length / math.sqrt((kind @ kind) * (length @ length))
    assert found["length_correlation"]["kind"][0] == pytest.approx(want)
    assert list(found["agreement"]) == ["kind~curt"]


def test_ratings_by_hand():
    rated = tuple(Rated(asked(str(i)), "x", {"kind": r} if r else {"curt": 1.0}) for i, r in enumerate([1.0, 3.0, 5.0, None]))
    labels = Labels("ratings", (), rated)
    scored = Scored({"kind": np.array([1.0, 4, 3, 9])}, np.arange(4.0), np.arange(4))
    found = measure_source(labels, scored, None, bins=5, seed=0)["ratings"]["kind"]
    assert found["rows"] == 3
    assert found["mean_absolute_error"][0] == pytest.approx((0 + 1 + 2) / 3)
    assert found["same_for_the_mean_rating"][0] == pytest.approx((2 + 0 + 2) / 3)
    assert found["spearman"][0] == pytest.approx(0.5)  # ranks 1 2 3 and 1 3 2


def test_card_shows_every_source():
    pairs = Labels("hh", tuple(Pair(asked(str(i)), "a", "b") for i in range(3)), (), {"equal answers": 2})
    scored = Scored({"kind": np.array([1.0, 0, 1, 0, 0, 1])}, np.zeros(6), np.arange(6) // 2)
    source = measure_source(pairs, scored, None, 5, 0) | {"failed": {}}
    text = card_text({"name": "n", "reward": {"type": "hf", "model": "org/m"}, "sources": {"helpful": source}})
    assert "| helpful | kind | 3 | 0.667 [" in text and "2 equal answers" in text and "| 0.70 to 0.80 | 3 |" in text
    assert "kind with log length, within a prompt | -" in text  # nothing varies, so nothing is claimed


REWARD = {"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity", "variety"]}


def test_evaluation_by_file(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("name: e\nreward: {type: embedded}\nsources: [{name: a, path: x.jsonl, attribute: helpfulness}]\n")
    job = evaluation_of(str(file), [], ["max_rows=50", "bins=10"])
    assert (job.max_rows, job.bins, outputs_of(job.reward)) == (50, 10, ("helpfulness", "harmlessness"))
    with pytest.raises(ConfigError, match="names its labels itself"):
        evaluation_of(str(file), ["a=b"], [])


def test_evaluation_by_reward():
    job = evaluation_of("embedded", ["helpfulness=a/pairs.jsonl", "ratings.jsonl"], ["out=/tmp/cards"])
    assert job.name == "embedded" and str(job.folder) == "/tmp/cards"
    assert [(s.name, s.path, s.attribute) for s in job.sources] == [
        ("helpfulness", "a/pairs.jsonl", "helpfulness"),
        ("ratings", "ratings.jsonl", None),
    ]


@pytest.mark.parametrize(
    ("what", "data", "message"),
    [
        ("embedded", [], "--data attribute=labels.jsonl"),
        ("no/such/folder", ["a.jsonl"], "is no model folder"),
        ("none.yaml", [], "no job file at 'none.yaml'"),
    ],
)
def test_evaluations_that_make_no_sense(what, data, message):
    with pytest.raises(ConfigError, match=message):
        evaluation_of(what, data, [])


def test_names_of_sources_must_differ():
    source = {"name": "a", "path": "x.jsonl"}
    with pytest.raises(ValueError, match="names must differ"):
        RewardEvaluateJob(name="e", reward=REWARD, sources=(source, source))
