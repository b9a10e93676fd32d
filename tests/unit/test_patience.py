"""Waiting with an end."""

import sys
import threading
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
    patience, seen, over = Patience("generate", 1.0, lambda: "32 rows in flight"), [], threading.Event()

    def items():
        yield from slow(0, 0.4, 0.4, 0.4)
        over.wait(30)
        yield 4

    with pytest.raises(ClusterError, match=r"generate: nothing finished for 1 s; it waits for 32 rows.*stall_timeout_s"):
        for item in patience.each(items()):
            seen.append(item)
    over.set()
    assert seen == [0, 1, 2, 3]  # the clock starts anew with each item


def test_background_hands_on_what_went_wrong():
    assert Background(lambda: None).over(5)
    over = threading.Event()
    assert not Background(lambda: over.wait(5)).over(0.05)
    over.set()

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Background(broken).over(5)


def test_a_thread_that_exits_is_neither_an_end_nor_a_stall():
    def leaving():
        yield 1
        sys.exit(3)

    with pytest.raises(SystemExit):
        list(Patience("score", 5.0, lambda: "nothing").each(leaving()))
    with pytest.raises(SystemExit):
        Background(lambda: sys.exit(3)).over(5)


def test_items_are_not_piled_up_ahead_of_a_slow_consumer():
    made = []

    def source():
        for i in range(100):
            made.append(i)
            yield i

    items = Patience("score", 5.0, lambda: "nothing").each(source())
    next(items)
    time.sleep(0.1)
    assert len(made) <= 3
