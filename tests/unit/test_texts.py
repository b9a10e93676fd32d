"""Rewards of words alone, by hand."""

import math

import pytest

from ctrlray.rewards.texts import brevity, coverage


def ask(text):
    return [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": text}]


def test_brevity_counts_words():
    found = brevity([ask("q")] * 3, ["", "Don't go!", "One two three four."])
    assert found == pytest.approx([0.0, -math.log(3), -math.log(5)])


def test_coverage_is_the_share_of_the_last_question_s_content_words():
    # content words: garden, water, evening; "should", "when" are function words, "my" is short
    question = ask("When should my garden get water in the evening?")
    answers = ["Water it.", "Gardens like WATER at dusk, or in evenings.", "Earlier is better.", ""]
    assert coverage([question] * 4, answers) == pytest.approx([1 / 3, 1.0, 0.0, 0.0])
    assert coverage([ask("Why is it so?")], ["It is so."]) == [0.0]
