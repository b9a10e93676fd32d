"""Seconds of a stage over all its attempts."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from ctrlray import clock, config, pipeline
from ctrlray.clock import Clock, note_start, start_seconds
from ctrlray.errors import StorageError
from ctrlray.ledger import Silent, StageResult
from ctrlray.tables import Storage


@pytest.fixture
def now(monkeypatch):
    """A clock that tests set."""
    at = [100.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: at[0]))
    return at


def test_seconds_go_on_where_a_killed_attempt_left_them(tmp_path, now):
    out = Storage(str(tmp_path))
    first = Clock(Silent(), out)
    now[0] += 20
    first.advance(3, 10)
    now[0] += 4  # less than the clock keeps at once: a kill now forgets it
    first.note("sampling")
    second = Clock(Silent(), out)
    now[0] += 7
    assert second.seconds == 20 + 7


def test_an_attempt_that_fails_is_kept_to_its_end(tmp_path, now):
    out = Storage(str(tmp_path))
    with pytest.raises(ValueError), Clock(Silent(), out):
        now[0] += 5
        raise ValueError
    with Clock(Silent(), out):
        now[0] += 3
    assert Clock(Silent(), out).seconds == 5  # what succeeded is told by the stage's result


def test_a_full_disk_does_not_hide_why_a_stage_failed(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError(errno.ENOSPC, "full")

    monkeypatch.setattr(Storage, "write_json", full)
    with pytest.raises(ValueError, match="the reason"), Clock(Silent(), Storage(str(tmp_path))):
        raise ValueError("the reason")


def test_progress_passes_through(tmp_path):
    calls = []

    class Seen(Silent):
        def total(self, rows):
            calls.append(("total", rows))

        def advance(self, rows, tokens=0):
            calls.append(("advance", rows, tokens))

        def note(self, text):
            calls.append(("note", text))

        def measure(self, name, step, values):
            calls.append(("measure", name, step, values))

    with Clock(Seen(), Storage(str(tmp_path))) as timed:
        timed.total(5)
        timed.advance(2, 9)
        timed.note("x")
        timed.measure("clm", 1, {"loss": 2.0})
    assert calls == [("total", 5), ("advance", 2, 9), ("note", "x"), ("measure", "clm", 1, {"loss": 2.0})]


def test_engine_starts_add_up(tmp_path):
    out = Storage(str(tmp_path))
    assert start_seconds(out) == 0.0
    note_start(out, 20.04)
    note_start(out, 31.0)
    assert start_seconds(out) == pytest.approx(51.0)


def test_the_ledger_counts_every_attempt(tmp_path, monkeypatch):
    job = config.load_job("smoke", [f"run_root={tmp_path}"])
    run = pipeline.Run(job)
    run.out("prompts").write_json({"seconds": 1000.0}, clock.FILE)
    monkeypatch.setitem(pipeline._RUNNERS, "prompts", lambda run, progress: StageResult(1, 1))
    assert pipeline.run(job, ["prompts"]).result("prompts")["seconds"] >= 1000.0
