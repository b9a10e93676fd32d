"""Runs on storage: which there are, what each did, and what of them is no longer needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrlray import config, models
from ctrlray import cost as costs
from ctrlray.errors import ConfigError
from ctrlray.lease import require_free
from ctrlray.pipeline import STAGES, Run
from ctrlray.tables import Storage


@dataclass(frozen=True)
class Summary:
    """One run, for a list."""

    root: str
    job: str
    stages: tuple[str, ...]
    """Finished stages in order."""
    started: str
    """When its last finished stage started, UTC; empty when none has finished."""


def find(folder: str | None = None) -> list[Summary]:
    """Runs right below a folder or URI (the user's data directory when unset), latest first."""
    storage = Storage(_absolute(folder or str(config.data_home() / "runs")))
    found = [summary(storage.sub(name)) for name in storage.folders() if storage.exists(name, "job.yaml")]
    return sorted(found, key=lambda s: s.started, reverse=True)


def summary(storage: Storage) -> Summary:
    """What a run's manifest says in one line."""
    manifest = storage.read_json("manifest.json") if storage.exists("manifest.json") else {}
    done: Mapping[str, Any] = manifest.get("stages", {})
    stages = tuple(s for s in STAGES if s in done)
    started = max((done[s]["started"] for s in stages), default="")
    return Summary(storage.uri, str(manifest.get("job", "?")), stages, started)


def locate(name: str) -> Storage:
    """The run of that name in the user's data directory, or at that path or URI. Raises ConfigError when there is none."""
    here = str(config.data_home() / "runs" / name) if "/" not in name else name
    storage = Storage(root := _absolute(here))
    if not storage.exists("job.yaml"):
        known = [Path(s.root).name for s in find()]
        raise ConfigError(f"no run at {root}; known runs: {', '.join(known) or 'none'}. `ctrlray runs list` shows them")
    return storage


def _absolute(folder: str) -> str:
    """A folder as seen from here; a URI as it is."""
    return folder if "://" in folder else str(Path(folder).expanduser().resolve())


def stale(storage: Storage) -> list[tuple[str, str]]:
    """(stage, key) of outputs that the run's job no longer refers to: those of earlier settings."""
    keys = Run.at(storage).keys
    return [(s, k) for s in STAGES for k in storage.folders(s) if k != keys[s]]


def clean(storage: Storage, everything: bool = False) -> int:
    """Delete outputs that are `stale`, or the whole run; returns the bytes that were freed.

    Raises ConfigError while a live run writes there.
    """
    require_free(storage)
    if everything:
        freed = storage.size()
        storage.delete()
        return freed
    freed = 0
    for stage, key in stale(storage):
        freed += storage.size(stage, key)
        storage.delete(stage, key)
    return freed


def cost(
    storage: Storage, parameters: float | None, rows: int | None, speedup: float, run_parameters: float | None
) -> dict[str, Any]:
    """What a run's finished stages cost, with a projection where a size, a number of rows or a speedup is asked for.

    Raises ConfigError when no stage has finished, or when the run's model is not on this machine and its size not given.
    """
    run = Run.at(storage)
    results = {s: r for s in STAGES if (r := run.result(s)) is not None}
    if not results:
        raise ConfigError(f"{storage.uri}: no stage has finished under the job that is kept there")
    found = costs.cost(results, costs.held(run.job, int(storage.read_json("manifest.json")["machine"]["cores"])))
    if parameters is None and rows is None and speedup == 1.0:
        return found
    shape = models.shape_here(run.job.model)
    size = run_parameters or (shape.parameters if shape else None)
    if size is None:
        raise ConfigError(f"{run.job.model.name} is not on this machine: say how many parameters it has with --run-params")
    return found | {"projection": costs.project(found, size, parameters, rows, speedup)}
