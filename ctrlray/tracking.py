"""Trackers beside TensorBoard: what a run measures, sent to MLflow or Weights & Biases. Off unless the job names one.

A tracker that fails in a run never stops it: its first error is logged, and it is left alone from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.ledger import Progress
from ctrlray.telemetry import current, warn

Values = Mapping[str, float]


class Tracker(Protocol):
    """One run at one service."""

    def log(self, values: Values, step: int | None) -> None:
        """Numbers by name, `a/b/c`; `step` counts optimizer steps where there are any."""

    def close(self, failed: bool) -> None:
        """End the run."""


class MLflow:
    """A run in an MLflow experiment."""

    def __init__(self, settings: config.MLflowTracker, job: config.Job, parameters: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=settings.uri)
        name = settings.experiment or "ctrlray"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=job.name).info.run_id
        for key, value in parameters.items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, values: Values, step: int | None) -> None:
        """Log all values."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step or 0)

    def close(self, failed: bool) -> None:
        """Mark the run finished or failed."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandB:
    """A run in a Weights & Biases project."""

    def __init__(self, settings: config.WandBTracker, job: config.Job, parameters: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=job.name,
            mode=settings.mode,
            dir=str(config.cache_home()),
            config=dict(parameters),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("train/*", step_metric="train/step")

    def log(self, values: Values, step: int | None) -> None:
        """Log all values."""
        self._run.log(dict(values) | ({} if step is None else {"train/step": step}))

    def close(self, failed: bool) -> None:
        """Finish the run and wait for its upload."""
        self._run.finish(exit_code=int(failed))


_KINDS: Mapping[str, tuple[Callable[..., Tracker], str]] = {"mlflow": (MLflow, "mlflow-skinny"), "wandb": (WandB, "wandb")}


class Trackers(AbstractContextManager["Trackers"]):
    """All trackers of a job as one; none is fine. Raises ConfigError when a tracker's package is missing or it will not start."""

    def __init__(self, job: config.Job, parameters: Mapping[str, Any]) -> None:
        self._open: list[Tracker] = []
        for settings in job.trackers:
            kind, package = _KINDS[settings.type]
            try:
                self._open.append(kind(settings, job, parameters))
            except Exception as error:
                self.__exit__(type(error), error, None)  # those before it have begun a run each
                lacks = f"needs the package {package}: `pip install {package}`"
                what = lacks if isinstance(error, ImportError) else f"did not start: {error}. Correct it or take it off"
                raise ConfigError(f"trackers: {settings.type} {what}") from error

    def log(self, values: Values, step: int | None = None) -> None:
        """Send numbers to every tracker that still works."""
        for tracker in list(self._open):
            try:
                tracker.log(values, step)
            except Exception as error:
                self._open.remove(tracker)
                warn(current(), f"{type(tracker).__name__} is left out from here on: {error}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close them all."""
        for tracker in self._open:
            try:
                tracker.close(failed=kind is not None)
            except Exception as problem:
                warn(current(), f"{type(tracker).__name__} did not close: {problem}")
        self._open = []


class Tracked:
    """A stage's progress whose measurements also go to the trackers."""

    def __init__(self, progress: Progress, trackers: Trackers, stage: str) -> None:
        self._progress, self._trackers, self._stage = progress, trackers, stage
        self.total, self.advance, self.note = progress.total, progress.advance, progress.note

    def measure(self, name: str, step: int, values: Values) -> None:
        """Pass on, and log as `<stage>/<name>/<value>`."""
        self._progress.measure(name, step, values)
        self._trackers.log({f"{self._stage}/{name}/{k}": v for k, v in values.items()}, step)


def stage_numbers(stage: str, result: Mapping[str, Any]) -> dict[str, float]:
    """A finished stage's accounts as numbers."""
    counts = {"rows_in": result["rows_in"], "rows_out": result["rows_out"], "seconds": result["seconds"]}
    counts |= {"dropped": sum(result["dropped"].values()), "quarantined": sum(result["quarantined"].values())}
    return {f"{stage}/{k}": float(v) for k, v in counts.items()}


def control_numbers(metrics: Mapping[str, Any], path: Sequence[str] = ()) -> dict[str, float]:
    """Every point estimate of the evaluation: `evaluate/exmate/attributes/safety/pairwise`."""
    if "value" in metrics and "low" in metrics:
        return {"/".join(["evaluate", *path]): float(metrics["value"])} if metrics["value"] is not None else {}
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found |= control_numbers(value, (*path, key))
    return found
