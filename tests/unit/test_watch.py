"""The watch beside training: what it passes on of the steps that rank 0 notes."""

from __future__ import annotations

import time

import pytest

from ctrlray.errors import ClusterError
from ctrlray.patience import Patience
from ctrlray.tables import Storage
from ctrlray.train import launch as train


class Watcher:
    def __init__(self):
        self.steps, self.done, self.of = [], 0, 0

    def total(self, rows):
        self.of = rows

    def advance(self, rows, tokens=0):
        self.done += rows

    def measure(self, name, step, values):
        self.steps.append((name, step, values["loss"]))


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Runs `moments`, each a step and the recent ones to be noted at it, as each is seen or `pause_s` apart; then ends."""
    monkeypatch.setattr(train, "_POLL_S", 0.02)
    place, watcher = Storage(str(tmp_path)), Watcher()

    def run(*moments, timeout_s=30.0, pause_s=None):
        made = train.Watch("clm", place, watcher)

        def fit():
            for at, recent in moments:
                points = [{"step": s, "loss": float(s)} for s in recent]
                place.write_json({"step": at, "steps": 9, "recent": points}, "progress.json")
                if (at, recent) != moments[-1]:
                    wait(at)

        def wait(at):
            end = time.monotonic() + (20 if pause_s is None else pause_s)
            while time.monotonic() < end and (pause_s is not None or made.seen != at):
                time.sleep(0.005)

        train.watched(fit, made, Patience("train", timeout_s, lambda: f"step {watcher.done + 1}"))
        return watcher

    return run


def test_every_step_is_told_once_the_last_one_too(watch):
    seen = watch((2, [1, 2]), (3, [2, 3]), (9, [7, 8, 9]))
    assert [s for _, s, _ in seen.steps] == [1, 2, 3, 7, 8, 9] and seen.steps[0] == ("clm", 1, 1.0)
    assert (seen.done, seen.of) == (9, 9)


def test_workers_that_go_back_to_a_snapshot_take_the_count_back(watch):
    seen = watch((5, [5]), (3, [2, 3]), (4, [3, 4]))
    assert seen.done == 4 and [s for _, s, _ in seen.steps] == [5, 4]


def test_training_that_ended_is_no_stall_for_being_looked_at_late(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_POLL_S", 5.0)
    watch = train.Watch("clm", Storage(str(tmp_path)), Watcher())
    train.watched(lambda: time.sleep(0.2), watch, Patience("train", 0.05, lambda: "it"))


def test_the_clock_starts_anew_with_each_step(watch):
    watch((1, [1]), (2, [2]), (3, [3]), (4, [4]), timeout_s=1.5, pause_s=0.6)
    with pytest.raises(ClusterError, match=r"train: nothing finished for 0\.2 s; it waits for step"):
        watch((5, [5]), (6, [6]), timeout_s=0.2, pause_s=0.6)


def test_steps_of_trainings_before_count_as_done(tmp_path):
    place, watcher = Storage(str(tmp_path)), Watcher()
    place.write_json({"step": 2, "steps": 9, "recent": [{"step": 2, "loss": 0.5}]}, "progress.json")
    train.Watch("ppo", place, watcher, before=6).look()
    assert (watcher.of, watcher.done) == (15, 2)
