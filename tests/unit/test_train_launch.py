"""Training that fails for good, with the real errors of Ray Train: what its user reads. No Ray is started."""

from __future__ import annotations

import pickle

import pytest
import ray.train.torch
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR, get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from ctrlray import config
from ctrlray.errors import ClusterError, DataError, StorageError
from ctrlray.tables import Storage
from ctrlray.train import launch

GLOO = RuntimeError("Traceback ...\n  line 3\nRuntimeError: [gloo] connection closed by peer")
FULL = StorageError("cannot write /run/curves.json: the disk is full. Free some space")


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """Launch a training whose `fit` raises; returns the error and keeps the settings that Ray Train was given."""

    def run(error):
        class Trainer:
            def __init__(self, loop, *, run_config, **_):
                run.given = run_config

            def fit(self):
                raise pickle.loads(pickle.dumps(error))  # as it comes from the controller's process

        monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
        settings = config.Train(max_failures=2)
        with pytest.raises(Exception) as caught:
            launch.launch(print, {}, settings, "clm-1", Storage(str(tmp_path)), what="train: clm")
        return caught.value

    return run


@pytest.mark.parametrize(
    "error",
    [
        WorkerGroupError("[Rank 1]", {0: GLOO, 1: FULL}),
        WorkerGroupError("[Rank 0]", {0: RayTaskError("f", "Traceback ...", FULL)}),
        WorkerGroupError("[Rank 0]", {0: WorkerHealthCheckFailedError("A worker health check failed.", FULL)}),
        ControllerError(FULL),
    ],
)
def test_what_ctrlray_refused_in_a_worker_is_raised_as_it_is(fit, error):
    found = fit(error)
    assert type(found) is StorageError and str(found) == str(FULL) and found.exit_code == 5
    assert isinstance(found.__cause__, type(error))


def test_of_two_refusals_the_lowest_rank_s_is_told(fit):
    found = fit(WorkerGroupError("", {3: DataError("three"), 1: DataError("one"), 0: GLOO}))
    assert type(found) is DataError and str(found) == "one"


def test_other_failures_are_told_by_objective_last_line_and_next_step(fit):
    found = fit(WorkerGroupError("[Rank 0] and [Rank 1]", {1: ValueError("collateral"), 0: GLOO}))
    assert type(found) is ClusterError and found.exit_code == 4
    assert str(found).startswith(
        "train: clm failed for good; it ended with: RuntimeError: [gloo] connection closed by peer. "
    )
    assert all(step in str(found) for step in ("lower micro_batch_tokens", "max_failures=2", "run the same command again"))


def test_a_worker_group_that_never_starts_is_told(fit):
    found = fit(ControllerError(WorkerGroupStartupTimeoutError(4)))
    assert type(found) is ClusterError
    assert "ended with: WorkerGroupStartupTimeoutError: The worker group startup timed out" in str(found)
    assert "4 workers" in str(found)


def test_errors_of_anything_else_pass_as_they_are(fit):
    assert type(fit(KeyError("x"))) is KeyError


def test_nothing_is_tried_for_ever(fit):
    fit(ControllerError(GLOO))
    wanted = fit.given.failure_config
    assert (wanted.max_failures, wanted.controller_failure_limit, wanted.max_preemption_failures) == (2, 100, 100)


@pytest.mark.parametrize("own", [None, "3"])
def test_reports_are_taken_twice_a_second_unless_the_user_says_otherwise(fit, monkeypatch, own):
    """Ray Train's own two seconds would be most of a small training: a worker waits for each snapshot to be taken."""
    name = HEALTH_CHECK_INTERVAL_S_ENV_VAR
    monkeypatch.setenv(name, own or "")  # so that it is as before afterwards
    if own is None:
        monkeypatch.delenv(name)
    fit(WorkerGroupError("", {0: GLOO}))
    assert get_env_vars_to_propagate()[name] == (own or "0.5")
