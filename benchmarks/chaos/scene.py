"""What a running trial shows from outside: who is at work on what, read from the run's own notes and from process titles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.chaos.job import BLOCKS, METHODS
from benchmarks.chaos.plan import CHILD, DRIVER, ENGINE, PPO, RAYLET, REWARD, WORKER, Where
from ctrlray.train.ppo.rollouts import part

TITLES = {ENGINE: "EngineHost.generate", REWARD: "RewardHost.score"}
"""Of actors that keep no notes, while they are at work."""

PARTS = {"generate": ("responses", BLOCKS), "score": ("scores", BLOCKS), "evaluate": ("answers", METHODS)}
"""The table that a stage writes, and in how many parts."""


class Found(NamedTuple):
    """A victim and the live work that it holds."""

    process: psutil.Process
    work: str


class Scene(NamedTuple):
    """A run and the processes that belong to it."""

    root: Path
    driver: psutil.Process
    raylets: tuple[int, ...]
    """Of the nodes beside the head; none where the driver has a Ray of its own."""

    def family(self) -> list[psutil.Process]:
        """Processes that may be killed, the driver and the raylets aside."""
        parents = [*map(_process, self.raylets)] if self.raylets else [self.driver]
        return [child for parent in parents if parent is not None for child in _children(parent)]

    def reached(self, where: Where, share: float) -> bool:
        """Whether a stage has begun and finished that share of its work."""
        if where.stage == "train":
            done, whole = self.steps(where.method)
            return bool(whole) and done >= int(share * whole)
        table, whole = PARTS[where.stage]
        done = len(list(self.root.glob(f"{where.stage}/*/{table}/*.parquet")))
        return done >= int(share * whole)

    def steps(self, method: str) -> tuple[int, int]:
        """Training steps done and to be done; none when it has not begun or is over."""
        place = next(self.root.glob(f"train/*/{method}"), None)
        if place is None or not (place / "progress.json").is_file() or (place / "done.json").is_file():
            return 0, 0
        now = json.loads((place / "progress.json").read_text())
        return now["step"], now["steps"]

    def _learning(self, method: str, step: int) -> bool:
        """Whether a step has what it learns from: one of PPO waits for its rollouts first."""
        return method != PPO or any(self.root.glob(f"train/*/{PPO}/rollouts/{part(step)}.parquet"))

    def notes(self, stage: str) -> list[dict[str, Any]]:
        """The notes of actors on what they have in flight."""
        try:
            return list(_read(self.root.glob(f"{stage}/*/in_flight/**/*.json")))
        except FileNotFoundError:  # a folder of them was cleared while it was read
            return []

    def look(self, victim: str, where: Where) -> Found | None:
        """A process of that kind that holds live work there, if there is one now."""
        if victim == DRIVER:
            held = next(iter(self._holders(where)), None)
            return Found(self.driver, held.work) if held else None
        if victim == RAYLET:
            for raylet in map(_process, self.raylets):
                mine = {p.pid for p in _children(raylet)} if raylet else set()
                if raylet and (held := next((h for h in self._holders(where) if h.process.pid in mine), None)):
                    return Found(raylet, held.work)
            return None
        wanted = ENGINE if victim == CHILD else victim
        held = next((h for h in self._holders(where) if _kind(h.process, where.stage) == wanted), None)
        if held and victim == CHILD:
            children = _children(held.process)
            return Found(children[0], held.work) if children else None
        return held

    def _holders(self, where: Where) -> Iterator[Found]:
        """Actors that hold live work of a stage."""
        for note in self.notes(where.stage):
            process = _process(int(note["process"].split(":")[1]))
            if process:
                yield Found(process, f"{len(note['rows'])} rows in flight, {note['first']} first")
        if where.stage in ("generate", "score"):
            return
        step, steps = self.steps(where.method)
        for process in self.family():
            title = _title(process)
            if any(t in title for t in TITLES.values()):
                yield Found(process, f"a batch at {title}")
            elif "RayTrainWorker" in title and step < steps and self._learning(where.method, step):
                yield Found(process, f"step {step + 1} of {steps}")


def _kind(process: psutil.Process, stage: str) -> str:
    title = _title(process)
    if "RayTrainWorker" in title:
        return WORKER
    return REWARD if "ScoreBatch" in title or TITLES[REWARD] in title else ENGINE


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _title(process: psutil.Process) -> str:
    """What a Ray process says that it does; it pads what it says."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _read(paths: Iterator[Path]) -> Iterator[dict[str, Any]]:
    """Notes that are still there."""
    for path in paths:
        try:
            yield json.loads(path.read_text())
        except FileNotFoundError:
            continue
