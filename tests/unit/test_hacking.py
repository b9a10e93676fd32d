"""Reward hacking by hand: when the alarm sounds, and what of PPO's rollouts it is read from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctrlray import config, schema
from ctrlray.distill import Levels
from ctrlray.errors import DataError
from ctrlray.metrics.hacking import parting
from ctrlray.stages import hacking
from ctrlray.stages.grid import Scored, text_id
from ctrlray.tables import Storage, from_rows

PROMPTS = 6


def course(reward, judge, noise=0.0):
    """One answer to each prompt at each step; `reward` and `judge` by step, prompts differing by `noise`."""
    steps = np.repeat(np.arange(1, len(reward) + 1), PROMPTS)
    shift = noise * np.tile(np.linspace(-1, 1, PROMPTS), len(reward))
    prompts = list("pqrstu") * len(reward)
    return parting(steps, np.repeat(reward, PROMPTS) + shift, np.repeat(judge, PROMPTS) - shift, prompts, 200)


def values(change):
    return (change["from"], change["to"], round(change["reward"]["value"], 6), round(change["judge"]["value"], 6))


def test_rewards_that_part_sound_the_alarm():
    found = course([0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 1, 1])
    assert found["alarm"] and [values(c) for c in found["changes"]] == [([1, 2], [5, 6], 2, -2), ([3, 4], [5, 6], 1, -2)]
    assert "last third" in found["rule"]


@pytest.mark.parametrize(
    ("reward", "judge", "alarm"),
    [
        ([0, 1, 2], [0, 1, 2], False),  # both rise
        ([2, 1, 0], [2, 1, 0], False),  # both fall
        ([2, 1, 0], [0, 1, 2], False),  # the judge alone rises: nothing is hacked
        ([0, 1, 2], [1, 1, 1], False),
        ([0, 1, 2], [0, 2, 1], True),  # it rose first: still above its start, below its middle
        ([0, 0, 2], [2, 1, 1.5], True),  # down from its start, up from its middle
        ([0, 2], [2, 0], False),  # two steps have no thirds
    ],
)
def test_alarms_by_course(reward, judge, alarm):
    assert course(reward, judge)["alarm"] is alarm


def test_a_change_that_prompts_disagree_on_sounds_nothing():
    """A drop of 2 that one prompt of six is alone with: resamples without that prompt see none."""
    steps, prompts = np.repeat([1, 2, 3], PROMPTS), list("pqrstu") * 3
    judge = np.zeros((3, PROMPTS))
    judge[2, 0] = -2
    found = parting(steps, np.repeat([0.0, 1, 2], PROMPTS), judge.ravel(), prompts, 200)
    assert not found["alarm"] and found["changes"][0]["judge"]["value"] == pytest.approx(-1 / 3)
    assert found["changes"][0]["judge"]["high"] == 0
    judge[2] = -2
    assert parting(steps, np.repeat([0.0, 1, 2], PROMPTS), judge.ravel(), prompts, 200)["alarm"]


JOB = config.parse(
    config.Job,
    {
        "name": "t",
        "control": {"attributes": [{"name": "a", "levels": 3}, {"name": "b", "levels": 2}]},
        "rewards": [
            {"type": "function", "target": "m:f", "attributes": ["a", "b"]},
            {"type": "function", "target": "m:g", "attributes": ["a", "b"], "judge": True},
        ],
        "train": {
            "objectives": [{"type": "ppo", "weights": {"b": 0.5}, "missing_eos_penalty": 0.25, "steps": 2, "batch_size": 16}],
        },
        "evaluate": {"judged_rollouts": 6, "bootstrap": 100},
    },
    where="test",
)


def rollout(step, i, **extra):
    row = dict.fromkeys(schema.rollouts(["a", "b"]).names)
    return row | {
        "rollout_id": f"{step}-{i}", "step": step, "prompt_id": f"p{i}", "text": f" text {step} {i}\n", "finish_reason": "stop",
        "error": "", "requested_a": 1, "requested_b": 2, "units_a": 2.0, "units_b": 1.0, "score_a": 0.0, "score_b": 0.0,
    } | extra  # fmt: skip


def stored(tmp_path, rows):
    out = Storage(str(tmp_path))
    out.sub("ppo").write_table(from_rows(rows, schema.rollouts(["a", "b"])), "rollouts")
    return out


def test_as_many_rollouts_of_each_step_and_none_with_an_error(tmp_path):
    rows = [rollout(s, i) for s in range(3) for i in range(9)] + [rollout(1, 9, error="engine_died")]
    drawn = hacking.rollouts(JOB, stored(tmp_path, rows))
    assert [r["step"] for r in drawn] == [0, 0, 1, 1, 2, 2] and "1-9" not in {r["rollout_id"] for r in drawn}
    assert drawn == hacking.rollouts(JOB, stored(tmp_path, rows[::-1]))
    texts = {(r["prompt_id"], f"text {r['step']} {r['rollout_id'][-1]}") for r in drawn}  # without what stands around them
    assert hacking.texts_of(drawn) == {text_id(*pair): pair for pair in texts}


SCALES = {"a": Levels(3, (0.0, 3.0), (0.0, 1.0)), "b": Levels(2, (0.0, 2.0), (0.0, 1.0))}
"""A score of s is s + 0.5 level units."""


def judged(rows, a, b):
    return Scored({text_id(r["prompt_id"], r["text"].strip()): {"a": a, "b": b} for r in rows}, SCALES)


def test_points_by_hand(tmp_path):
    """Own: -(|2 - 1| + 0.5 |1 - 2|) = -1.5. Judge at 3 and 1.5 units: -(|3 - 1| + 0.5 |1.5 - 2|) = -2.25. Cut off: 0.25 less."""
    rows = [rollout(0, 0), rollout(0, 1, finish_reason="length"), rollout(1, 0, units_a=1.0)]
    drawn = hacking.rollouts(JOB, stored(tmp_path, rows))
    curves = [{"step": 1, "length": 10.0}, {"step": 2, "length": 12.0, "kl": 0.5}]
    found = hacking.measure(drawn, JOB, judged(rows, 2.5, 1.0), curves)
    first, second = found["points"]
    wanted = {"step": 1, "reward": -1.625, "judge": -2.375, "kl": None, "length": 10.0, "rollouts": 2}
    assert first == pytest.approx(wanted)
    wanted = {"step": 2, "reward": -0.5, "judge": -2.25, "kl": 0.5, "length": 12.0, "rollouts": 1}
    assert second == pytest.approx(wanted)
    assert found["alarm"] is False and found["changes"] == []


def test_many_steps_become_twenty_points_and_their_means(tmp_path):
    made = JOB.model_copy(update={"evaluate": JOB.evaluate.model_copy(update={"judged_rollouts": 1000})})
    rows = [rollout(s, i) for s in range(50) for i in range(2)]
    curves = [{"step": s + 1, "length": float(s), "kl": 2.0 * s} for s in range(50)]
    points = hacking.measure(hacking.rollouts(made, stored(tmp_path, rows)), made, judged(rows, 0, 0), curves)["points"]
    assert len(points) == 20 and points[-1]["step"] == 50 and sum(p["rollouts"] for p in points) == 100
    assert points[0]["step"] == 3 and points[0]["length"] == 1.0 and points[0]["kl"] == 2.0


def test_rollouts_without_a_judge_s_score_are_left_out_and_all_of_them_an_error(tmp_path):
    rows = [rollout(0, 0), rollout(0, 1)]
    drawn = hacking.rollouts(JOB, stored(tmp_path, rows))
    (point,) = hacking.measure(drawn, JOB, judged(rows[:1], 1, 1), [{"step": 1, "length": 1.0}])["points"]
    assert point["rollouts"] == 1 and math.isfinite(point["judge"])
    with pytest.raises(DataError, match="scored none of 2 rollouts"):
        hacking.measure(drawn, JOB, judged([], 1, 1), [])
