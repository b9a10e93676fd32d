"""Trackers: real MLflow and Weights & Biases packages, both writing to local folders."""

from __future__ import annotations

import logging
import sys
import time
from typing import ClassVar

import pytest

from ctrlray import config, pipeline, tracking
from ctrlray.errors import ConfigError
from ctrlray.ledger import Silent, StageResult
from ctrlray.tracking import Tracked, Trackers, control_numbers, stage_numbers

RAW = {
    "name": "t",
    "control": {"attributes": [{"name": "brevity", "levels": 2}]},
    "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}],
    "prompts": {"train": 20, "eval": 4},
}


def job(*trackers, **extra):
    return config.parse(config.Job, RAW | {"trackers": list(trackers)} | extra, where="t")


@pytest.fixture
def mlflow_uri(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def test_they_are_off_by_default():
    assert config.load_job("quickstart").trackers == ()
    with Trackers(job(), {}) as none:
        none.log({"a": 1.0})


def test_mlflow_gets_parameters_steps_and_results(mlflow_uri):
    from mlflow.tracking import MlflowClient

    with Trackers(job({"type": "mlflow", "uri": mlflow_uri, "experiment": "e"}), {"train.epochs": 2}) as trackers:
        progress = Tracked(Silent(), trackers, "train")
        for step, loss in enumerate([3.0, 2.0, 1.0], 1):
            progress.measure("exmate", step, {"loss": loss})
        trackers.log({"generate/rows_in": 20.0})
    client = MlflowClient(tracking_uri=mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.data.params == {"train.epochs": "2"} and run.info.status == "FINISHED" and run.info.run_name == "t"
    assert run.data.metrics == {"train/exmate/loss": 1.0, "generate/rows_in": 20.0}
    history = client.get_metric_history(run.info.run_id, "train/exmate/loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_failed_run_is_marked_failed(mlflow_uri):
    from mlflow.tracking import MlflowClient

    with pytest.raises(ZeroDivisionError), Trackers(job({"type": "mlflow", "uri": mlflow_uri}), {}):
        _ = 1 / 0
    client = MlflowClient(tracking_uri=mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ctrlray").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Trackers(job({"type": "wandb", "mode": "offline"}), {"train.epochs": 2}) as trackers:
        trackers.log({"train/exmate/loss": 2.0}, 1)
    (file,) = (tmp_path / "ctrlray" / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 20  # a process of its own writes it, and is not waited for
    while b"train/exmate/loss" not in file.read_bytes() and time.monotonic() < end:
        time.sleep(0.05)
    assert b"train/exmate/loss" in file.read_bytes()


def test_a_tracker_that_breaks_never_stops_a_run(mlflow_uri, caplog):
    with Trackers(job({"type": "mlflow", "uri": mlflow_uri}), {}) as trackers:
        with caplog.at_level(logging.WARNING):
            trackers.log({"a": "no number"})  # type: ignore[dict-item]
        assert "MLflow is left out from here on" in caplog.text
        trackers.log({"a": 1.0})


def test_a_tracker_that_cannot_start_is_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"trackers: mlflow did not start.*Correct it or take it off"):
        Trackers(job({"type": "mlflow", "uri": "nonsense://x"}), {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb needs the package wandb: `pip install wandb`"):
        Trackers(job({"type": "wandb"}), {})


def test_the_pipeline_logs_what_stages_did(tmp_path, mlflow_uri):
    from mlflow.tracking import MlflowClient

    tracked = job({"type": "mlflow", "uri": mlflow_uri}, run_root=str(tmp_path / "run"))
    pipeline.run(tracked, ["prompts"])
    client = MlflowClient(tracking_uri=mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ctrlray").experiment_id])
    assert run.data.metrics["prompts/rows_in"] == 256 and run.data.metrics["prompts/dropped"] == 232
    assert run.data.params["prompts.train"] == "20"


def test_trackers_change_no_key():
    plain, tracked = job(), job({"type": "wandb"})
    assert pipeline.Run(plain).keys == pipeline.Run(tracked).keys


def test_numbers_by_hand():
    result = {"rows_in": 5, "rows_out": 2, "seconds": 1.5, "dropped": {"a": 1, "b": 1}, "quarantined": {"c": 1}}
    assert stage_numbers("score", result) == {
        "score/rows_in": 5,
        "score/rows_out": 2,
        "score/seconds": 1.5,
        "score/dropped": 2,
        "score/quarantined": 1,
    }
    value = {"value": 0.7, "low": 0.6, "high": 0.8}
    metrics = {"exmate": {"attributes": {"brevity": {"pairwise": value, "mae": value | {"value": None}}}, "note": "x"}}
    assert control_numbers(metrics) == {"evaluate/exmate/attributes/brevity/pairwise": 0.7}


class Recorder:
    """A tracker that keeps what it is told, or breaks at everything."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, settings, job, parameters):
        self.broken, self.told, self.asked = settings.type == "mlflow", [], 0
        self.made.append(self)

    def log(self, values, step):
        self.asked += 1
        if self.broken:
            raise ConnectionError("away")
        self.told.append((dict(values), step))

    def close(self, failed):
        if self.broken:
            raise ConnectionError("still away")
        self.told.append(failed)


@pytest.fixture
def recorders(monkeypatch):
    monkeypatch.setattr(tracking, "_KINDS", {"mlflow": (Recorder, "x"), "wandb": (Recorder, "x")})
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def test_a_broken_tracker_is_asked_once_and_the_one_behind_it_misses_nothing(recorders):
    with Trackers(job({"type": "mlflow"}, {"type": "wandb"}), {}) as trackers:
        trackers.log({"a": 1.0})
        trackers.log({"a": 2.0}, 7)
    broken, whole = recorders
    assert broken.asked == 1 and whole.told == [({"a": 1.0}, None), ({"a": 2.0}, 7), False]


def test_trackers_that_cannot_close_never_hide_how_the_run_ended(recorders, caplog):
    with pytest.raises(ZeroDivisionError), Trackers(job({"type": "mlflow"}, {"type": "wandb"}), {}):
        _ = 1 / 0
    assert "did not close: still away" in caplog.text and recorders[1].told == [True]


def test_a_tracker_that_does_not_start_ends_those_that_did(recorders, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no such server")

    monkeypatch.setitem(tracking._KINDS, "mlflow", (refuse, "x"))
    with pytest.raises(ConfigError, match="trackers: mlflow did not start: no such server"):
        Trackers(job({"type": "wandb"}, {"type": "mlflow"}), {})
    assert recorders[0].told == [True]


def test_what_is_tracked_is_also_shown(recorders):
    shown = []

    class Shown(Silent):
        def measure(self, name, step, values):
            shown.append((name, step, values))

    with Trackers(job({"type": "wandb"}), {}) as trackers:
        Tracked(Shown(), trackers, "train").measure("clm", 3, {"loss": 0.5})
    assert shown == [("clm", 3, {"loss": 0.5})] and recorders[0].told[0] == ({"train/clm/loss": 0.5}, 3)


def test_what_the_evaluation_measured_is_logged(tmp_path, recorders, monkeypatch):
    tracked = job({"type": "wandb"}, run_root=str(tmp_path))
    pipeline.Run(tracked).out("train").write_json(StageResult(1, 1).to_dict() | {"seconds": 0.0}, "result.json")

    error = {"value": 0.7, "low": 0.6, "high": 0.8}

    def evaluate(run, progress):
        run.out("evaluate").write_json({"clm": {"attributes": {"brevity": {"mae": error}}}}, "metrics.json")
        return StageResult(1, 1)

    monkeypatch.setitem(pipeline._RUNNERS, "evaluate", evaluate)
    monkeypatch.setattr(pipeline, "start_ray", lambda wanted: None)
    monkeypatch.setattr(pipeline, "_await_fit", lambda job, progress, stage: None)
    pipeline.run(tracked, ["evaluate"])
    assert ({"evaluate/clm/attributes/brevity/mae": 0.7}, None) in recorders[0].told
