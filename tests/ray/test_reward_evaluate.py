"""A reward held against labels on real local actors."""

from __future__ import annotations

import json

import pytest

from ctrlray import config
from ctrlray.errors import ConfigError, DataError
from ctrlray.rewards.evaluate import evaluate
from ctrlray.rewards.job import LabelledSource, RewardEvaluateJob


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def job(folder, target, attributes, *sources):
    reward = config.FunctionReward(target=f"tests.fakes:{target}", attributes=attributes)
    return RewardEvaluateJob(name="card", out=str(folder), reward=reward, sources=sources, batch_size=3)


@pytest.mark.slow
def test_two_outputs_against_pairs_and_ratings(local_ray, tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": "ab" if i else "long one", "rejected": "abcd"} for i in range(4)]
    rated = [{"prompt": "q", "response": "x" * n, "brevity": -n, "variety": 1} for n in (1, 2, 3, 4)]
    sources = (
        LabelledSource(name="short wins", path=write(tmp_path / "p.jsonl", pairs), attribute="brevity"),
        LabelledSource(name="by hand", path=write(tmp_path / "r.jsonl", rated)),
    )
    card = evaluate(job(tmp_path, "length_reward", ("brevity", "variety"), *sources))
    first, second = card["sources"]["short wins"], card["sources"]["by hand"]
    assert first["accuracy"][0] == first["length_only"][0] == 0.75 and first["length_only_rule"] == "shorter wins"
    assert first["accuracy_of_others"]["variety"][0] == 0.25
    assert second["ratings"]["brevity"]["mean_absolute_error"] == [0, 0, 0]
    assert second["ratings"]["brevity"]["spearman"][0] == pytest.approx(1)
    assert second["ratings"]["variety"]["spearman"] == [None, None, None]  # all alike: nothing to rank
    assert json.loads((tmp_path / "card.json").read_text()) == card
    assert "| short wins | brevity | 4 | 0.750 [" in (tmp_path / "card.md").read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_answers_that_fail_are_counted(local_ray, tmp_path):
    pairs = [{"prompt": "q", "chosen": "good one", "rejected": "nan"}, {"prompt": "q", "chosen": "boom", "rejected": "x"}]
    pairs += [{"prompt": f"q{i}", "chosen": "longer", "rejected": "x"} for i in range(3)]
    source = LabelledSource(name="all", path=write(tmp_path / "p.jsonl", pairs))
    measured = evaluate(job(tmp_path, "faulty_reward", ("size",), source))["sources"]["all"]
    assert measured["failed"] == {"not_finite": 1, "RuntimeError": 1}
    assert measured["accuracy"][0] == 1.0 and sum(b["count"] for b in measured["calibration"]["bins"]) == 3

    only = LabelledSource(name="bad", path=write(tmp_path / "b.jsonl", [{"prompt": "q", "response": "nan", "size": 1}] * 2))
    with pytest.raises(DataError, match=r"sources.bad: the reward scored no answer; the first error: not_finite"):
        evaluate(job(tmp_path, "faulty_reward", ("size",), only))


def test_sources_must_say_what_they_are_about(tmp_path):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2)
    source = LabelledSource(name="s", path=pairs)
    with pytest.raises(ConfigError, match=r"sources.s: set attribute to the output"):
        evaluate(job(tmp_path, "length_reward", ("brevity", "variety"), source))
    with pytest.raises(ConfigError, match=r"sources.s.attribute='charm': the reward gives \['brevity'\]"):
        evaluate(job(tmp_path, "length_reward", ("brevity",), source.model_copy(update={"attribute": "charm"})))
