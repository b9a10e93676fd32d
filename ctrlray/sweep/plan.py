"""A sweep file becomes jobs: one per variant, and what they share.

    name: ablation
    job: quickstart                      # a packaged job, a path beside this file, or a job written out here
    set: {train.epochs: 2}               # in every variant
    variants:
      - {name: none, set: {distill.strategy: none}}
    axes: {train.objectives.0.weight: [0, 1, 5]}     # every combination, named weight-0, ...

Reads and computes only; nothing is run or written here.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.pipeline import STAGES, UPSTREAM, Run
from ctrlray.placement import Group, Node, packs
from ctrlray.tables import Storage

SHARED = ("prompts", "generate", "score")
"""Stages whose tables variants share; from distillation on a variant has its own."""
OWN = STAGES[len(SHARED) :]
_OF_A_RUN = ("name", "run_root")
"""Settings of a job that a sweep gives itself."""


class Variant(config.Frozen):
    """One job of a sweep: the sweep's job with some settings of its own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,38}$")]
    set: dict[str, Any] = Field(default_factory=dict)
    """`a.b: value`; mappings are merged, lists are replaced."""


class Sweep(config.Frozen):
    """A sweep file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,23}$")]
    job: str | dict[str, Any] = config.QUICKSTART
    """A packaged job, a job file's path from here, or a job written out."""
    run_root: config.Root | None = None
    """Absolute path or URI of the sweep; `sweeps/<name>` in the user's data directory when unset."""
    parallel: Annotated[int, Field(ge=1)] = 1
    """Variants at the same time, at most: as many as the cluster has room for. 1: each with a Ray of its own."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of every variant."""
    variants: tuple[Variant, ...] = ()
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Values by setting; every combination is a variant. One that equals another variant is that variant."""
    base: str = "base"
    """The variant that the others are compared with; the job as it is, unless a variant has that name."""

    @property
    def root(self) -> str:
        """Absolute path or URI of the sweep."""
        return config.place(self.run_root) if self.run_root else str(config.data_home() / "sweeps" / self.name)


@dataclass(frozen=True)
class Pool:
    """Answers and scores that variants share."""

    job: config.Job
    """Runs the shared stages, in a run root of their own."""
    users: tuple[str, ...]


class StagePlan(NamedTuple):
    """What a variant does about one stage."""

    stage: str
    shared: bool
    state: str
    """`finished`, `never ran`, ..., as `Run.state` has it; of a shared stage, where it is shared."""
    why: str
    """How it relates to the base's stage."""


@dataclass(frozen=True)
class Plan:
    """A sweep and the jobs that it is made of."""

    sweep: Sweep
    jobs: Mapping[str, config.Job]
    """By variant, the base first."""

    @property
    def base(self) -> str:
        """The variant that the others are compared with."""
        return self.sweep.base

    @cached_property
    def storage(self) -> Storage:
        """The sweep's root."""
        return Storage(self.sweep.root)

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Every variant at its storage."""
        return {name: Run(job) for name, job in self.jobs.items()}

    @cached_property
    def pools(self) -> list[Pool]:
        """One per distinct key of the last shared stage."""
        users: dict[str, list[str]] = {}
        for name, run in self.runs.items():
            users.setdefault(run.keys[SHARED[-1]], []).append(name)
        given = {"name": f"{self.sweep.name}-shared", "run_root": self.storage.sub("shared").uri}
        return [Pool(self.jobs[names[0]].model_copy(update=given), tuple(names)) for names in users.values()]

    def pool_of(self, variant: str) -> Pool:
        """Where a variant's shared tables are."""
        return next(p for p in self.pools if variant in p.users)

    def changes(self, variant: str) -> list[str]:
        """Settings in which a variant differs from the base, as `a.b: base's -> its own`."""
        return _apart(self.jobs[self.base], self.jobs[variant])

    def stages(self, variant: str) -> list[StagePlan]:
        """What a variant shares and what it does itself, and why."""
        run, shared = self.runs[variant], Run(self.pool_of(variant).job)
        return [
            StagePlan(s, s in SHARED, (shared if s in SHARED and run.result(s) is None else run).state(s), self._why(variant, s))
            for s in STAGES
        ]

    def _why(self, variant: str, stage: str) -> str:
        mine, theirs = self.runs[variant].keys, self.runs[self.base].keys
        if variant == self.base:
            return "the base"
        if mine[stage] == theirs[stage]:
            return "as the base's"
        followed = [u for u in UPSTREAM[stage] if mine[u] != theirs[u]]
        return f"follows {followed[0]}" if followed else "other settings"


def load(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a sweep file; `overrides` are `a.b=value` of the file itself. ConfigError names variant and field."""
    sweep = config.parse(Sweep, config.read_job(path, overrides), where=str(path))
    raw = copy.deepcopy(sweep.job) if isinstance(sweep.job, dict) else config.read_job(_job_file(sweep.job, path))
    jobs: dict[str, config.Job] = {}
    for variant, from_axes in _variants(sweep):
        where = f"{path}: variant {variant.name!r}"
        if variant.name in jobs:
            raise ConfigError(f"{where} is there twice; give each its own name")
        job = _job(sweep, raw, variant, where)
        twin = next((other for other, known in jobs.items() if not _apart(known, job)), None)
        if twin is not None and not from_axes:
            raise ConfigError(f"{where} is the same job as {twin!r}; drop one of them")
        if twin is None:
            jobs[variant.name] = job
    return Plan(sweep, jobs)


def _apart(before: config.Job, after: config.Job) -> list[str]:
    """Settings in which two variants differ, as `a.b: old -> new`."""
    return [line for line in config.differences(before, after) if line.split(":")[0] not in _OF_A_RUN]


def _job_file(name: str, sweep_file: Path) -> Path:
    beside = sweep_file.parent / Path(name).expanduser()
    return beside if beside.is_file() else config.find_job(name)


def _variants(sweep: Sweep) -> Iterator[tuple[Variant, bool]]:
    """Every variant, the base first, and whether it is a point of the axes."""
    named = [v for v in sweep.variants if v.name == sweep.base]
    if not named:
        yield config.parse(Variant, {"name": sweep.base}, where="base"), False
    for variant in [*named, *(v for v in sweep.variants if v.name != sweep.base)]:
        yield variant, False
    if sweep.axes:
        for values in itertools.product(*sweep.axes.values()):
            point = dict(zip(sweep.axes, values, strict=True))
            name = "_".join(_label(key, value) for key, value in point.items())
            yield config.parse(Variant, {"name": name, "set": point}, where=f"axes: variant {name!r}"), True


def _label(key: str, value: Any) -> str:
    """`train.objectives.0.weight` at 0.05 -> `weight-0.05`."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{key.rsplit('.', 1)[-1]}-{value}").strip("-.")


def _job(sweep: Sweep, raw: Mapping[str, Any], variant: Variant, where: str) -> config.Job:
    mine = copy.deepcopy(dict(raw))
    for field, settings in (("set", sweep.set), (f"variant {variant.name!r}: set", variant.set)):
        for key, value in _merged(settings):
            if key in _OF_A_RUN:
                raise ConfigError(f"{where}: {field}.{key} is given by the sweep itself; set the sweep's own {key}")
            config.put(mine, key, copy.deepcopy(value), f"{where}: {key}")
    mine |= {"name": f"{sweep.name}-{variant.name}", "run_root": Storage(sweep.root).sub("variants", variant.name).uri}
    return config.parse(config.Job, mine, where=where)


def _merged(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """`{"train": {"epochs": 1}}` -> `("train.epochs", 1)`."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _merged(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def slots(phases: Sequence[Sequence[Group]], nodes: Sequence[Node], most: int) -> int:
    """How many jobs find room at the same time, whichever of the phases each of them is in; at least 1, at most `most`."""
    distinct = [list(p) for p in {tuple(g._replace(phase="", operator="") for g in phase) for phase in phases}]
    for count in range(2, most + 1):
        worst = itertools.combinations_with_replacement(distinct, count)
        if not all(packs([g for phase in together for g in phase], nodes) for together in worst):
            return count - 1
    return most
