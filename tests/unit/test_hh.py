"""HH's native files: turns, shared context, the judge's half."""

import hashlib

import pytest

from ctrlray.errors import DataError
from ctrlray.hh import judge_half, parse_dialogue, parse_pair, write_prompt


def test_dialogue_by_hand():
    text = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nWhat now?\n\nHuman:  Go: on. \n\nAssistant: Done."
    assert parse_dialogue(text) == [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello!\n\nWhat now?"},  # a blank line alone does not end a turn
        {"role": "user", "content": "Go: on."},
        {"role": "assistant", "content": "Done."},
    ]


def test_a_prompt_is_written_as_it_is_read():
    turns = [("user", "Hi."), ("assistant", "Hello!\n\nWhat now?"), ("user", "Go: on.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = write_prompt(messages)
    assert text == "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nWhat now?\n\nHuman: Go: on.\n\nAssistant:"
    assert parse_dialogue(f"{text} Done.") == [*messages, {"role": "assistant", "content": "Done."}]
    system = {"role": "system", "content": "Be brief."}
    assert write_prompt([system, messages[0]]) == "\n\nHuman: Be brief.\n\nHuman: Hi.\n\nAssistant:"


def test_speaker_twice_is_one_message():
    messages = parse_dialogue("\n\nHuman: a\n\nHuman: b\n\nAssistant: c")
    assert messages == [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]


def test_speaker_name_inside_a_line_is_text():
    assert parse_dialogue("\n\nHuman: The Assistant: a film\nHuman: no\n\nAssistant: ok")[0]["content"].endswith("Human: no")


def test_pair_shares_all_but_the_last_answer():
    start = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant: "
    pair = parse_pair(start + "good", start + "bad")
    assert [m["content"] for m in pair.messages] == ["Q", "A", "Q2"]
    assert (pair.chosen, pair.rejected) == ("good", "bad")


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: y"),
        ("\n\nHuman: a\n\nAssistant: x\n\nHuman: z", "\n\nHuman: a\n\nAssistant: y"),
        ("no speaker", "\n\nHuman: a\n\nAssistant: y"),
    ],
)
def test_malformed_pairs_are_refused(chosen, rejected):
    with pytest.raises(DataError):
        parse_pair(chosen, rejected)


def test_judge_half_is_the_last_bit_of_the_hash():
    # sha256("hello") ends in ...b9824 (hex digit 4: bit 0); sha256("abc") ends in ...15ad (hex digit d: bit 1).
    assert hashlib.sha256(b"hello").hexdigest()[-1] == "4"
    assert not judge_half("hello") and not judge_half("  hello\n")
    assert hashlib.sha256(b"abc").hexdigest()[-1] == "d"
    assert judge_half("abc")


def test_halves_are_about_equal():
    assert 450 < sum(judge_half(f"opening number {i}") for i in range(1000)) < 550
