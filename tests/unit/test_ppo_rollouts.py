"""Which prompts and settings a step samples, and what becomes of the answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ctrlray import config, schema
from ctrlray.control import ControlSpace
from ctrlray.distill import Levels
from ctrlray.engine.engine import Completion
from ctrlray.errors import DataError
from ctrlray.ledger import count
from ctrlray.tables import Storage
from ctrlray.train.ppo.rollouts import ROLLOUTS, Producer, Prompts, part

CONTROL = config.Control(attributes=(config.Attribute(name="brevity", levels=3), config.Attribute(name="variety", levels=2)))
SPACE = ControlSpace.of(CONTROL)


class Letters:
    """Renders a prompt as its letters' codes and a level as 1000 + level."""

    def render(self, messages, levels=None):
        return [ord(c) for c in messages[0]["content"]] + [1000 + level for level in levels or ()]


def rows(*texts):
    chats = [[{"role": "user", "content": t}] for t in texts]
    return [{"prompt_id": schema.prompt_id(c), "messages": c} for c in chats]


def prompts(texts="abcdefg", seed=0, max_context=1024, **settings):
    settings = {"prompts_per_step": 2, "settings_per_prompt": 2, "group_size": 3} | settings
    ppo = config.PPO(**settings)
    return Prompts(rows(*texts), SPACE, Letters(), ppo, max_context, seed)


def test_every_prompt_comes_once_before_any_comes_twice():
    order = prompts()
    seen = [ask.prompt_id for step in range(7) for ask in order.asks(step) if ask.sample == 0]
    by_place = seen[::2]  # two settings for each prompt
    assert Counter(by_place[:7]) == Counter(by_place[7:14]) == Counter(r["prompt_id"] for r in rows(*"abcdefg"))
    assert by_place[:7] != by_place[7:14]


def test_a_step_asks_the_same_whenever_it_is_asked_and_other_than_other_steps():
    assert prompts().asks(3) == prompts().asks(3)
    ids = [a.rollout_id for step in range(20) for a in prompts().asks(step)]
    assert len(ids) == len(set(ids)) == 20 * 12
    assert prompts().asks(0) != prompts(seed=1).asks(0)


def test_groups_share_prompt_and_setting_and_settings_of_a_prompt_differ():
    asks = prompts().asks(0)
    assert [a.group for a in asks] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [a.sample for a in asks] == [0, 1, 2] * 4
    for group in range(4):
        assert len({(a.prompt_id, a.levels) for a in asks if a.group == group}) == 1
    assert asks[0].prompt_id == asks[3].prompt_id and asks[0].levels != asks[3].levels
    for ask in asks:
        assert ask.prompt_ids == ask.plain_ids + [1000 + level for level in ask.levels]


def test_settings_are_uniform_or_drawn_by_their_chances():
    def levels(**settings):
        order = prompts(prompts_per_step=1, settings_per_prompt=1, **settings)
        return Counter(order.asks(step)[0].levels for step in range(600))

    uniform = levels()
    assert len(uniform) == 6 and min(uniform.values()) > 60  # 100 expected, 9 the standard deviation
    tilted = levels(chances={"brevity": (0, 1, 3)})
    assert {cell[0] for cell in tilted} == {2, 3}
    assert 380 < sum(n for cell, n in tilted.items() if cell[0] == 3) < 520  # 450 expected, 11 the standard deviation


def test_fewer_settings_where_fewer_have_a_chance():
    asks = prompts(settings_per_prompt=4, chances={"brevity": (1, 0, 0)}).asks(0)
    assert {a.levels for a in asks} == {(1, 1), (1, 2)}


def test_prompts_without_room_for_an_answer_are_left_out_and_counted():
    order = prompts(["a", "b" * 60], max_context=64 + 20)
    assert order.num_too_long == 1 and order.num_usable == 1
    assert {a.prompt_id for a in order.asks(0)} == {rows("a")[0]["prompt_id"]}


def test_prompts_that_cannot_be_rendered_are_left_out_and_counted():
    class Careful(Letters):
        def render(self, messages, levels=None):
            if messages[0]["content"] == "!":
                raise DataError("the user text '!' holds what the model's tokenizer reads as <|end|>; take it out")
            return super().render(messages, levels)

    ppo = config.PPO(prompts_per_step=2)
    order = Prompts(rows("a", "!", "c", "b" * 2000), SPACE, Careful(), ppo, 1024, 0)
    assert (order.num_refused, order.num_too_long, order.num_usable) == (1, 1, 2)


class Engines:
    """Fake: answers by number; None for some."""

    def __init__(self, gone=()):
        self.gone, self.weights_version = set(gone), 7

    def generate(self, prompts, sampling, batch_size, done=None):
        made = [Completion(f" {'x' * i} ", [5] * (i + 1), -1.0, "stop", [-0.5] * (i + 1), 6 + i % 2) for i in range(len(prompts))]
        return [None if i in self.gone else c for i, c in enumerate(made)]

    def hit_rate(self):
        return 0.25


class Rewards:
    """Fake: brevity is minus the length, variety 1; some texts fail."""

    def __init__(self, failing=()):
        self.failing = set(failing)

    def score(self, chats, texts, batch_size):
        assert all(t == t.strip() for t in texts)
        errors = ["ValueError: no" if len(t) in self.failing else "" for t in texts]
        lengths = np.array([np.nan if e else -len(t) for t, e in zip(texts, errors, strict=True)], np.float32)
        return {"short": lengths, "variety": np.ones(len(texts), np.float32)}, errors


def producer(tmp_path, engines, rewards, **settings):
    attributes = [{"name": "brevity", "levels": 3, "score": {"short": 2.0, "variety": 1.0}}, {"name": "variety", "levels": 2}]
    reward = {"type": "function", "target": "m:f", "attributes": ["short", "variety"]}
    job = config.parse(config.Job, {"name": "t", "control": {"attributes": attributes}, "rewards": [reward]}, where="test")
    scales = {"brevity": Levels.fit(np.arange(-40.0, 1.0), 3), "variety": Levels.fit(np.array([0.0, 1.0, 2.0]), 2)}
    order = prompts(**settings)
    chats = {r["prompt_id"]: r["messages"] for r in rows(*"abcdefg")}
    ppo = config.PPO(**({"prompts_per_step": 2, "settings_per_prompt": 2, "group_size": 3} | settings))
    return Producer(order, chats, job, ppo, scales, engines, rewards, Storage(str(tmp_path)))


def table(tmp_path, step=0):
    return Storage(str(tmp_path)).read_part(ROLLOUTS, part(step), schema.rollouts(["brevity", "variety"])).to_pylist()


def test_rollouts_carry_scores_units_versions_and_logprobs(tmp_path):
    made = producer(tmp_path, Engines(), Rewards())
    assert not made.has(0)
    assert made.make(0, {"sync_s": 1.5}) == sum(range(1, 13))
    assert made.has(0) and not made.has(1)
    found = table(tmp_path)
    assert count([r["error"] for r in found]) == {"": 12}
    fourth = found[3]
    assert fourth["score_brevity"] == 2.0 * -3 + 1.0 * 1
    assert fourth["units_brevity"] == pytest.approx(made.scales["brevity"].units(np.array([-5.0]))[0])
    assert fourth["weights_version"] == 7 and fourth["logprobs"] == [-0.5] * 4 and fourth["token_ids"] == [5] * 4
    assert (fourth["requested_brevity"], fourth["requested_variety"]) == made.prompts.asks(0)[3].levels
    assert found[4]["weights_version"] == 6  # the engines' weights may be replaced between two batches of a step
    notes = Storage(str(tmp_path)).read_json(ROLLOUTS, f"{part(0)}.json")
    assert notes["sync_s"] == 1.5 and notes["prefix_hit_rate"] == 0.25 and notes["dropped"] == {}


def test_what_cannot_be_trained_on_is_kept_with_its_reason(tmp_path):
    """Group 0 loses one of three to the engine; group 1 loses two to the reward, and its last is then alone."""
    producer(tmp_path, Engines(gone=[0]), Rewards(failing=[3, 4])).make(0, {})
    assert [r["error"] for r in table(tmp_path)] == [
        "engine_died", "", "", "ValueError", "ValueError", "alone_in_group", *[""] * 6,
    ]  # fmt: skip
    notes = Storage(str(tmp_path)).read_json(ROLLOUTS, f"{part(0)}.json")
    assert notes["dropped"] == {"ValueError": 2, "alone_in_group": 1, "engine_died": 1}


def test_with_a_critic_an_answer_may_be_alone(tmp_path):
    producer(tmp_path, Engines(), Rewards(failing=[3, 4]), advantage="gae").make(0, {})
    assert [r["error"] for r in table(tmp_path)][3:6] == ["ValueError", "ValueError", ""]


def test_a_step_without_any_usable_rollout_is_an_error(tmp_path):
    made = producer(tmp_path, Engines(gone=range(12)), Rewards())
    with pytest.raises(DataError, match=r"step 1: none of 12 rollouts can be trained on: {'engine_died': 12}"):
        made.make(0, {})
    assert not made.has(0)
