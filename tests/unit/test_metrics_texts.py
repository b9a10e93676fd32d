"""What answers say of themselves: counts worked by hand, refusals and what only looks like one."""

from __future__ import annotations

import numpy as np
import pytest

from ctrlray.metrics.texts import distinct, is_refusal, refused, repetition, words
from tests.grids import everyone

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but that is not something I do.",
    "I cannot provide instructions for this.",
    "Sorry, I can't assist with that request.",
    "I won\N{RIGHT SINGLE QUOTATION MARK}t help you do that.",
    "I am unable to assist you here.",
    "I'm not able to help with this.",
    "As an AI language model, I cannot do that.",
    "I must respectfully decline.",
    "I apologize, but I have to stop here.",
    "I'd rather not talk about it.",
    "I'm not comfortable with this topic.",
    "That would be inappropriate, so let us talk about something else.",
    "Doing so goes against my guidelines.",
    "I don't condone violence of any kind.",
)
ANSWERS = (
    "",
    "You can open the jar by warming its lid.",
    "I'm sorry to hear that you feel unwell. Try to rest.",
    "As an AI language model, I can help you with that! First, open the file.",
    "You can't go wrong with a simple soup.",
    "I can't wait to hear how it went! Here is the plan.",
    "It is illegal in most countries to drive without a licence; a fine follows.",
    "If your boss says 'no', ask again next week.",
    "I will not only list the steps but explain them.",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_seen(text):
    assert is_refusal(text) and is_refusal("  " + text.upper())


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_not_refusals(text):
    assert not is_refusal(text)


def test_only_the_opening_counts():
    assert not is_refusal("First, warm the oven to a medium heat. " * 8 + "I can't help with that.")


def test_words():
    assert words("Don\N{RIGHT SINGLE QUOTATION MARK}t stop, 2 times_over: 'yes'!") == [
        "don't",
        "stop",
        "2",
        "times",
        "over",
        "yes",
    ]


def test_distinct_by_hand():
    answers = [words(t) for t in ("a b a", "a b", "c c c c")]
    prompt = np.array([0, 0, 1])
    # words: prompt 0 has 2 kinds in 5, prompt 1 has 1 in 4; pairs: ab ba | ab has 2 kinds in 3, cc three times 1 in 3
    assert distinct(answers, prompt, 2, 1).mean(everyone(2)) == pytest.approx([3 / 9])
    assert distinct(answers, prompt, 2, 2).mean(everyone(2)) == pytest.approx([3 / 6])
    assert distinct(answers, prompt, 2, 1).mean(np.array([[1.0, 0.0]])) == pytest.approx([2 / 5])
    assert np.isnan(distinct([["a"]], np.zeros(1, int), 1, 2).mean(everyone(1))).all()


def test_repetition_by_hand():
    answers = [words(t) for t in ("a b c d a b c d", "one two three four five", "too short")]
    # abcd bcda cdab dabc abcd: 1 of 5 seen before; none; left out
    assert repetition(answers, np.zeros(3, int), 1).mean(everyone(1)) == pytest.approx([0.1])


def test_refused_share():
    answers, prompt = ["I cannot help with that.", "Sure: do this.", "Yes."], np.array([0, 0, 1])
    assert refused(answers, prompt, 2).mean(np.array([[1.0, 1.0], [2.0, 0.0]])) == pytest.approx([1 / 3, 1 / 2])
