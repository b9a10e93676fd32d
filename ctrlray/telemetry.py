"""What a run says of itself while it runs: metrics for Prometheus on Ray's endpoints, and log lines with run, stage and row.

Every node of a Ray cluster serves what its processes record; ctrlray's own are `ray_ctrlray_...` there, and
`cluster/grafana.json` draws them. Nothing is recorded in a process without Ray. Gauges, not counters, hold what a run that
goes on takes over from its earlier attempts.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

from ctrlray.ledger import Progress

_LOG = logging.getLogger("ctrlray")
_LONGEST = 500
"""Characters of a log line's text."""


class Where(NamedTuple):
    """What a metric or a log line is about."""

    run: str = ""
    """Last part of the run root."""
    stage: str = ""


NOWHERE = Where()


class Metric(NamedTuple):
    """A series: counters only grow, gauges are what was last said."""

    kind: str
    text: str
    labels: tuple[str, ...] = ()
    """Beside `run` and `stage`."""


METRICS: Mapping[str, Metric] = {
    "ctrlray_rows_wanted": Metric("gauge", "Rows that a stage has to do; steps while it trains"),
    "ctrlray_rows_done": Metric("gauge", "Rows that a stage has done, over all attempts at it"),
    "ctrlray_tokens": Metric("counter", "Tokens sampled by this attempt"),
    "ctrlray_stage_seconds": Metric("gauge", "Seconds that a finished stage took, over all attempts at it"),
    "ctrlray_dropped_rows": Metric("gauge", "Rows that a finished stage dropped", ("reason",)),
    "ctrlray_quarantined_rows": Metric("gauge", "Rows that a finished stage quarantined", ("error",)),
    "ctrlray_actor_restarts": Metric("counter", "Engines and reward actors started in place of one that ended", ("actor",)),
    "ctrlray_weights_version": Metric("gauge", "Version of the weights that all engines proved to hold"),
    "ctrlray_loss": Metric("gauge", "Loss of the last optimizer step", ("objective",)),
    "ctrlray_code_gap": Metric("gauge", "Held-out wrong-minus-right-code NLL, nats per token", ("objective",)),
    "ctrlray_reward": Metric("gauge", "Reward of the last step's rollouts, level units", ("objective",)),
    "ctrlray_kl": Metric("gauge", "KL to the model that training started from, nats per response", ("objective",)),
    "ctrlray_level_error": Metric("gauge", "Mean distance from the levels asked for, level units", ("method", "attribute")),
}
_MEASURED = {"loss": "ctrlray_loss", "valid_gap": "ctrlray_code_gap", "reward": "ctrlray_reward", "kl": "ctrlray_kl"}
_ERROR = "error_"

_here: ContextVar[Where] = ContextVar("where", default=NOWHERE)


def exported(name: str) -> str:
    """A metric's name on Ray's endpoint."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def current() -> Where:
    """The run and stage that this thread of the driver is in; processes that it starts are given it."""
    return _here.get()


@contextlib.contextmanager
def at(root: str, stage: str) -> Iterator[None]:
    """Be in a stage of the run at `root`."""
    token = _here.set(Where(root.split("?")[0].rstrip("/").rsplit("/", 1)[-1], stage))
    try:
        yield
    finally:
        _here.reset(token)


def record(where: Where, name: str, value: float, **labels: str) -> None:
    """Set a gauge, or add to a counter, under its labels."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    tags = {**where._asdict(), **labels}
    series = _series(name)
    if METRICS[name].kind == "counter":
        if value:
            series.inc(value, tags=tags)
    else:
        series.set(value, tags=tags)


@cache
def _series(name: str) -> Any:
    from ray.util import metrics

    known = METRICS[name]
    kind = metrics.Counter if known.kind == "counter" else metrics.Gauge
    return kind(name, description=known.text, tag_keys=(*Where._fields, *known.labels))


def record_if_restarted(where: Where, actor: str) -> None:
    """In an actor's constructor: count it where Ray started it in place of one that ended."""
    import ray

    context = ray.get_runtime_context() if ray.is_initialized() else None
    if context is not None and context.get_actor_id() and context.was_current_actor_reconstructed:
        record(where, "ctrlray_actor_restarts", 1, actor=actor)


def record_accounts(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """What the finished stages of this run did with their rows: each as `StageResult.to_dict` gives it, with `seconds`."""
    for stage, result in stages.items():
        where = current()._replace(stage=stage)
        record(where, "ctrlray_rows_wanted", result["rows_in"])
        record(where, "ctrlray_rows_done", result["rows_in"])
        record(where, "ctrlray_stage_seconds", result["seconds"])
        for reason, rows in result["dropped"].items():
            record(where, "ctrlray_dropped_rows", rows, reason=reason)
        for error, rows in result["quarantined"].items():
            record(where, "ctrlray_quarantined_rows", rows, error=error)


def record_level_errors(metrics: Mapping[str, Any]) -> None:
    """Mean absolute errors of an evaluation, by method and attribute, as `metrics.json` has them."""
    for method, found in metrics.items():
        for attribute, values in found["attributes"].items():
            if (error := values["mae"]["value"]) is not None:
                record(current(), "ctrlray_level_error", error, method=method, attribute=attribute)


def warn_quarantined(where: Where, rows: Sequence[Mapping[str, Any]]) -> None:
    """One log line for rows that are quarantined together, as `schema.QUARANTINE` has them; nothing where there are none."""
    if rows:
        error, detail = rows[0]["error"], rows[0]["detail"]
        more = f", and {len(rows) - 1} more with it" if len(rows) > 1 else ""
        said = detail if detail.startswith(error) else f"{error}: {detail}"
        warn(where, f"quarantined, {said}{more}", str(rows[0]["row_id"]))


class Metered:
    """A stage's progress that is recorded too."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._where, self._rows = progress, current(), 0
        self.note = progress.note

    def total(self, rows: int) -> None:
        """Pass on, and record."""
        self._progress.total(rows)
        record(self._where, "ctrlray_rows_wanted", rows)

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Pass on, and record."""
        self._progress.advance(rows, tokens)
        self._rows += rows
        record(self._where, "ctrlray_rows_done", self._rows)
        record(self._where, "ctrlray_tokens", tokens)

    def measure(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Pass on, and record what there is a metric of."""
        self._progress.measure(name, step, values)
        for key, value in values.items():
            if key in _MEASURED:
                record(self._where, _MEASURED[key], value, objective=name)
            elif key.startswith(_ERROR):
                record(self._where, "ctrlray_level_error", value, method=name, attribute=key.removeprefix(_ERROR))


def warn(where: Where, text: str, row: str = "") -> None:
    """One log line: `run=quickstart stage=score row=5f2c: not_finite: ...`."""
    about = [f"{k}={v}" for k, v in {**where._asdict(), "row": row}.items() if v]
    _LOG.warning("%s: %s", " ".join(about) or "ctrlray", " ".join(text.split())[:_LONGEST])
