"""Waiting with an end."""

import time

import pytest

from ctrlray.errors import ClusterError
from ctrlray.patience import Background, Patience


def slow(*pauses):
    for i, pause in enumerate(pauses):
        time.sleep(pause)
        yield i


def test_items_pass_in_order_and_errors_too():
    patience = Patience("score", 5.0, lambda: "nothing")
    assert list(patience.each(range(5))) == [0, 1, 2, 3, 4]

    def broken():
        yield 1
        raise KeyError("x")

    found = []
    with pytest.raises(KeyError, match="x"):
        found.extend(patience.each(broken()))
    assert list(patience.each(iter(()))) == []


def test_a_stall_names_the_stage_the_time_and_what_it_waits_for():
    patience, seen = Patience("generate", 0.3, lambda: "32 rows in flight"), []
    with pytest.raises(ClusterError, match=r"generate: nothing finished for 0.3 s; it waits for 32 rows.*stall_timeout_s"):
        for item in patience.each(slow(0, 0.1, 0.1, 30)):
            seen.append(item)
    assert seen == [0, 1, 2]  # the clock starts anew with each item


def test_background_hands_on_what_went_wrong():
    assert Background(lambda: None).over(5)
    assert not Background(lambda: time.sleep(5)).over(0.05)

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Background(broken).over(5)
