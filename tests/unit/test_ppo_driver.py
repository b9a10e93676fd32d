"""The driver's side of PPO, with fake engines and a fake learner: which weights are sampled with, who waits for whom."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ctrlray import config
from ctrlray.errors import ClusterError, DataError
from ctrlray.ledger import Silent
from ctrlray.patience import Background
from ctrlray.tables import Storage
from ctrlray.train.launch import Watch
from ctrlray.train.ppo import drive
from ctrlray.train.ppo.rollouts import ROLLOUTS, part
from ctrlray.train.ppo.weights import write_weights

CARD = {"lora_scale": 2.0, "control_ids": [7, 8]}


def publish(out: Storage, version: int) -> None:
    write_weights(out, version, {"a.lora_A": torch.tensor([[float(version)]])}, CARD)


class Engines:
    """Fake: notes what it was given."""

    def __init__(self):
        self.weights_version, self.given = 0, []

    def load_adapter(self, adapter, card, version):
        assert adapter["a.lora_A"].item() == version and card == CARD
        self.weights_version = version
        self.given.append(version)


class Producer:
    """Fake: writes a mark for a step, and with which weights it was sampled."""

    def __init__(self, out):
        self.out, self.engines, self.made = out, Engines(), []

    def has(self, step):
        return self.out.exists(ROLLOUTS, f"{part(step)}.parquet")

    def make(self, step, notes):
        assert set(notes) == {"sync_s", "learner_s"}
        self.made.append((step, self.engines.weights_version))
        self.out.write_bytes(b"", ROLLOUTS, f"{part(step)}.parquet")
        return 10


def learner(out, steps, first=0, pause_s=0.0, ahead=0):
    """Fake: waits for the rollouts of each step, 2 s for those of as many `ahead`, then publishes weights and notes the step."""

    def run():
        for step in range(first, steps):
            while not out.exists(ROLLOUTS, f"{part(step)}.parquet"):
                time.sleep(0.005)
            end = time.monotonic() + 2
            while time.monotonic() < end and not out.exists(ROLLOUTS, f"{part(min(step + ahead, steps - 1))}.parquet"):
                time.sleep(0.005)
            time.sleep(pause_s)
            publish(out, step + 1)
            out.write_json({"step": step + 1, "steps": steps, "recent": []}, "progress.json")

    return run


def driver(tmp_path, run, steps=4, timeout_s=5.0, **settings):
    out = Storage(str(tmp_path))
    ppo = config.PPO(steps=steps, **settings)
    producer = Producer(out)
    task = SimpleNamespace(objective=ppo, out=out, settings=config.Train())
    return drive._Driver(task, producer, Background(run(out)), Watch("ppo", out, Silent()), Silent(), timeout_s), producer


def test_rollouts_of_a_step_come_from_the_weights_behind_the_step_before(tmp_path):
    made, producer = driver(tmp_path, lambda out: learner(out, 4))
    made.run()
    assert producer.made == [(0, 0), (1, 1), (2, 2), (3, 3)] and producer.engines.given == [1, 2, 3]


def test_with_staleness_a_step_is_sampled_while_the_one_before_trains(tmp_path):
    made, producer = driver(tmp_path, lambda out: learner(out, 4, ahead=1), max_staleness=1)
    made.run()
    assert [step for step, _ in producer.made] == [0, 1, 2, 3]
    assert producer.made[1][1] == 0  # nobody waited for version 1
    assert all(step - 1 <= version <= step for step, version in producer.made)


def test_what_is_there_is_not_sampled_again(tmp_path):
    out = Storage(str(tmp_path))
    for step in range(3):
        out.write_bytes(b"", ROLLOUTS, f"{part(step)}.parquet")
    publish(out, 3)
    made, producer = driver(tmp_path, lambda out: learner(out, 4, first=2))
    made.run()
    assert producer.made == [(3, 3)] and producer.engines.given == [3]


def test_the_learners_error_is_the_drivers(tmp_path):
    def run(out):
        def fail():
            raise DataError("row 7 is odd")

        return fail

    made, producer = driver(tmp_path, run)
    with pytest.raises(DataError, match="row 7 is odd"):
        made.run()
    assert producer.made == [(0, 0)]  # version 0 needs no learner


def test_a_learner_that_ends_early_is_an_error(tmp_path):
    made, _ = driver(tmp_path, lambda out: lambda: None)
    with pytest.raises(ClusterError, match="ppo ended while version 1 of the weights was waited for"):
        made.run()


def test_a_learner_that_stands_still_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 0.5})
    over = threading.Event()
    made, _ = driver(tmp_path, lambda out: over.wait, timeout_s=0.2)
    with pytest.raises(ClusterError, match=r"nothing finished for 0\.2 s; it waits for version 1 of .* 1 workers .*0\.5 CPUs"):
        made.run()
    over.set()


def test_each_step_gives_a_waiting_driver_its_time_anew(tmp_path):
    """A learner that lags: all rollouts lie there, and it needs longer for them than anybody waits for one step."""
    out = Storage(str(tmp_path))
    for step in range(4):
        out.write_bytes(b"", ROLLOUTS, f"{part(step)}.parquet")
    made, _ = driver(tmp_path, lambda out: learner(out, 4, pause_s=0.5), timeout_s=1.5)
    made.run()
