"""From what an operator names (a folder, a run) to the models that are served, and their files on each node."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from ctrlray import config, models, pipeline, runs
from ctrlray.errors import ConfigError
from ctrlray.serve import transport
from ctrlray.serve.dial import Dial
from ctrlray.serve.settings import NAME, ServeSettings, Source
from ctrlray.stages.export import CARD, START
from ctrlray.tables import Storage


@dataclass(frozen=True)
class Entry:
    """One model to serve. Small and picklable."""

    name: str
    source: str
    """Folder, or URI of one."""
    folder: str
    """Local folder on every node; made from a URI by `local`."""
    card: dict[str, Any]
    max_context: int

    @property
    def dial(self) -> Dial:
        """Its dial."""
        return Dial.of(self.card)

    @property
    def method(self) -> str:
        """How it was made."""
        return str(self.card["method"])

    @property
    def coded(self) -> bool:
        """Whether it knows control codes."""
        return self.method != START

    def local(self) -> Path:
        """Its folder on this node, fetched if it lies on object storage."""
        return fetch(self.source, Path(self.folder)) if "://" in self.source else Path(self.folder)


@dataclass(frozen=True)
class Catalog:
    """All models, and the run whose rewards go with them."""

    entries: tuple[Entry, ...]
    rewards_of: config.Job | None
    scales: dict[str, Any]
    """Level scales of that run by attribute; empty without one."""


def resolve(settings: ServeSettings) -> Catalog:
    """Find every model. Raises ConfigError for what is not there, names that collide, and models that nothing could dial."""
    found = [(source, _run_of(source)) for source in settings.models]
    entries = [e for source, run in found for e in _entries(source, run, settings)]
    names = [e.name for e in entries]
    if odd := [n for n in names if not re.fullmatch(NAME, n)]:
        raise ConfigError(f"{odd[0]!r} cannot be a model's name in the API; set models.name to letters, digits, `.`, `_` and `-`")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"two models have the name {twice[0]!r}; set models.name for one of them")
    run = next((r for _, r in found if r is not None), None)
    if settings.rewards and run is None:
        raise ConfigError("rewards: true needs a run among the models; these are folders")
    if not settings.rewards and (plain := [e.name for e in entries if not e.coded]):
        raise ConfigError(f"{plain[0]!r} knows no control codes; serve it with `rewards: true`, which chooses among its answers")
    if settings.rewards and run is not None:
        _check_same_dial(entries, run.job)
        return Catalog(tuple(entries), run.job, _scales(run))
    return Catalog(tuple(entries), None, {})


def fetch(uri: str, folder: Path) -> Path:
    """Copy a folder of object storage into `folder`, once per node."""
    if folder.is_dir():
        return folder
    storage = Storage(uri)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        fs.copy_files(storage.path(), str(made), storage.filesystem, fs.LocalFileSystem())
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _run_of(source: Source) -> pipeline.Run | None:
    """The run that a source names; None for a folder."""
    if "://" in source.model:
        storage = Storage(source.model)
        return None if storage.exists(CARD) else pipeline.Run.at(runs.locate(source.model))
    path = Path(source.model).expanduser()
    if (path / CARD).is_file():
        return None
    if (path / "config.json").is_file():
        raise ConfigError(f"{path} is a model without a dial (no {CARD}); serve a folder that `ctrlray export` wrote, or a run")
    name = str(path.resolve()) if path.is_dir() else source.model
    return pipeline.Run.at(runs.locate(name))


def _entries(source: Source, run: pipeline.Run | None, settings: ServeSettings) -> list[Entry]:
    if run is None:
        if source.methods:
            raise ConfigError(f"models: {source.model} is one exported model; methods are of runs")
        there = source.model if "://" in source.model else str(Path(source.model).expanduser().resolve())
        name = Path(there.partition("?")[0] if "://" in there else there).name
        return [_entry(source.name or name, there, settings.max_context)]
    context = settings.max_context or run.job.model.max_context
    name = source.name or run.job.name
    if not source.methods:
        return [_entry(name, pipeline.exported_folder(run), context)]
    return [
        _entry(f"{name}-{m}" if len(source.methods) > 1 else name, pipeline.exported_folder(run, m), context)
        for m in source.methods
    ]


def _entry(name: str, source: str, max_context: int | None) -> Entry:
    folder = Path(source)
    if "://" in source:
        storage = Storage(source)
        card = storage.read_json(CARD)
        folder = config.cache_home() / "fetched" / f"{name}-{_stamp(storage)}"
        shape = storage.read_json("config.json")
    else:
        models.check_folder(folder)
        card = json.loads((folder / CARD).read_text())
        shape = json.loads((folder / "config.json").read_text())
    longest = int(shape.get("max_position_embeddings", 0)) or 2048
    return Entry(name, source, str(folder), card, min(max_context or longest, longest))


def _stamp(storage: Storage) -> str:
    """Changes when the folder's files do."""
    infos = storage.filesystem.get_file_info([storage.path(n) for n in storage.names()])
    return hashlib.sha256(repr([(i.base_name, i.size, i.mtime_ns) for i in infos]).encode()).hexdigest()[:16]


def _check_same_dial(entries: list[Entry], job: config.Job) -> None:
    own = [(a.name, a.levels) for a in job.control.attributes]
    for e in entries:
        if [(r.name, r.levels) for r in e.dial.ranges] != own:
            raise ConfigError(f"{e.name!r} has another dial than the run of the rewards, {dict(own)}; serve it by itself")


def _scales(run: pipeline.Run) -> dict[str, Any]:
    from ctrlray.stages.distill import load_scales

    if run.result("distill") is None:
        raise ConfigError(f"the run at {run.job.root} has no level scales yet; run `ctrlray distill` first")
    return dict(load_scales(run.out("distill")))


def environment() -> dict[str, str]:
    """What replicas need of this process's environment."""
    own = {name: os.environ[name] for name in ("PYTHONPATH", "XDG_CACHE_HOME", "XDG_DATA_HOME") if name in os.environ}
    return own | transport.environment()
