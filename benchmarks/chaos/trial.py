"""One trial: start the pipeline, kill one process in the midst of its work, let the run recover, compare what it made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from benchmarks.chaos import compare
from benchmarks.chaos.job import job
from benchmarks.chaos.plan import CHILD, DRIVER, LIKELIHOOD, PPO, RAYLET, Trial, Where, plan
from benchmarks.chaos.scene import Found, Scene
from ctrlray.config import load_job
from ctrlray.pipeline import STAGES, Run

TOP = Path(__file__).parents[2]
MOST_S = 400.0
"""A run that takes longer hangs."""
TRIES = 3
"""A trial whose run ends before its victim was at work is begun anew, for an earlier moment."""
MOST_RERUNS = 2
HUNG = 124
"""Instead of the exit code of a run that had to be ended: no rerun makes good for it."""
_POLL_S = 0.02
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}
"""No workers that no actor can use; and Ray's workers as nice as their driver: on a busy machine they would starve beside it."""
_WHOLE = {LIKELIHOOD: "prompts", PPO: "train"}
"""The first stage of the undisturbed run that a method's trials are compared with; both share the stages before training."""
_SHARED = STAGES[STAGES.index("train") - 1]
_EXTENSIONS = "torch_extensions"


class Missed(Exception):
    """The run ended before its victim was at work."""


class Failed(Exception):
    """The run ended with an error before anything was killed."""


class Stale(Exception):
    """What the root holds was made by other code than this."""


class Cluster(NamedTuple):
    """Nodes on this machine, or none."""

    address: str | None = None
    raylets: tuple[int, ...] = ()


class Lab:
    """A folder with a tiny model, the undisturbed runs, and one folder a trial."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.model = self.root / "model"

    def outcome(self, number: int, *, timed: bool = True) -> dict[str, Any]:
        """What became of a trial, in as many tries as it takes to meet its victim at work. Raises Missed after `TRIES`."""
        for tried in range(TRIES - 1):
            try:
                return self.run(plan(number).earlier(tried), timed=timed)
            except Missed as missed:
                print(f"trial {number}, once more: {missed}", flush=True)
        return self.run(plan(number).earlier(TRIES - 1), timed=timed)

    def run(self, trial: Trial, *, timed: bool = True) -> dict[str, Any]:
        """A trial's outcome; not `timed`, without the seconds that an undisturbed run would have saved. Raises Missed."""
        where, folder = trial.where, self.root / "trials" / f"{trial.number:03d}"
        self.prepare(where)
        usual_s = self.undisturbed_s(where, clustered=trial.clustered) if timed else None
        with nodes(trial.clustered, self.environment()) as cluster:
            self.set_up(folder, where.method, where.first, cluster.address)
            began = time.monotonic()
            drivers = [self.start(folder, where.last)]
            with none_left(drivers):
                scene = Scene(folder / "run", psutil.Process(drivers[0].pid), cluster.raylets)
                try:
                    found, title = kill(trial, scene, drivers[0])
                except Failed as failed:
                    return _as_failed(trial, time.monotonic() - began, failed)
                killed_s = time.monotonic() - began
                codes = [finish(drivers[0])]
                while codes[-1] not in (0, HUNG) and len(codes) <= MOST_RERUNS:
                    drivers.append(self.start(folder, where.last))
                    codes.append(finish(drivers[-1]))
                seconds = time.monotonic() - began
        outcome: dict[str, Any] = {
            "trial": trial.number,
            "kind": trial.kind,
            "stage": where.stage,
            "method": where.method,
            "victim": title,
            "work": found.work,
            "killed_s": round(killed_s, 1),
            "seconds": round(seconds, 1),
            "codes": codes,
            "recovered": "" if codes[-1] else "rerun" if len(codes) > 1 else "itself",
            "seconds_lost": None if usual_s is None else round(seconds - usual_s, 1),
        }
        return outcome | self.judged(folder, where, codes)

    def judged(self, folder: Path, where: Where, codes: Sequence[int]) -> dict[str, Any]:
        """What the run made, beside what it should have made; the folder is kept where that is not the same."""
        if codes[-1] != 0:
            return {"lost": None, "twice": None, "unequal": None, "unaccounted": None, "said": said(folder)}
        difference, unaccounted = self.difference(folder, where), compare.unaccounted(folder, where)
        if difference == compare.NONE and not unaccounted:
            shutil.rmtree(folder)
        return {
            "lost": difference.lost,
            "twice": difference.twice,
            "unequal": list(difference.unequal),
            "unaccounted": unaccounted,
            "said": "",
        }

    def difference(self, folder: Path, where: Where) -> compare.Difference:
        """Of a run's tables from those of the undisturbed one."""
        return compare.differ(compare.rows(folder, where), compare.rows(self.whole(where.method), where))

    def whole(self, method: str) -> Path:
        """Folder of the undisturbed run that others are compared with."""
        return self.root / "whole" / method

    def prepare(self, where: Where) -> None:
        """Make the model and the undisturbed runs, as far as a trial needs them, where they are not there."""
        if not (self.model / "config.json").is_file():
            from tests.fakes import tiny_model

            tiny_model(self.model)
        self._make_whole(LIKELIHOOD, where.last if where.method == LIKELIHOOD else _SHARED)
        if where.method != LIKELIHOOD:
            self._make_whole(where.method, where.last)

    def _make_whole(self, method: str, last: str) -> None:
        folder = self.whole(method)
        if not (folder / "job.yaml").is_file():
            self.set_up(folder, method, _WHOLE[method], None)
        elif yaml.safe_load((folder / "job.yaml").read_text()) != job(self.model, folder / "run", method, None):
            raise Stale(f"{folder} is of another job; give an empty root")
        if not self._is_made(folder, last):
            if any((folder / "run" / last).glob("*/result.json")):
                raise Stale(f"{folder} is of other code or rewards; give an empty root")
            self._undisturbed(folder, last)

    @staticmethod
    def _is_made(folder: Path, last: str) -> bool:
        return Run(load_job(folder / "job.yaml")).result(last) is not None

    def undisturbed_s(self, where: Where, *, clustered: bool) -> float:
        """Seconds of an undisturbed run of a trial's stages, made when they are first asked for; its tables are compared too."""
        name = f"{where.method}-{where.first}-{where.last}{'-clustered' if clustered else ''}"
        noted = self.root / "undisturbed" / f"{name}.json"
        if not noted.is_file():
            folder = noted.with_suffix("")
            with nodes(clustered, self.environment()) as cluster:
                self.set_up(folder, where.method, where.first, cluster.address)
                seconds = self._undisturbed(folder, where.last)
            if (difference := self.difference(folder, where)) != compare.NONE:
                raise RuntimeError(f"two undisturbed runs differ, {name}: {difference}")
            noted.write_text(json.dumps({"seconds": seconds}))
            shutil.rmtree(folder)
        return float(json.loads(noted.read_text())["seconds"])

    def _undisturbed(self, folder: Path, last: str) -> float:
        began = time.monotonic()
        driver = self.start(folder, last)
        with none_left([driver]):
            code, seconds = finish(driver), time.monotonic() - began
        if code != 0:
            raise RuntimeError(f"the undisturbed run in {folder} ended with {code}: {said(folder)}")
        return seconds

    def set_up(self, folder: Path, method: str, first: str, address: str | None) -> None:
        """A job file, and the finished stages before `first`."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for stage in STAGES[: STAGES.index(first)]:
            of = method if stage == "train" else LIKELIHOOD
            shutil.copytree(self.whole(of) / "run" / stage, folder / "run" / stage)
        (folder / "job.yaml").write_text(yaml.safe_dump(job(self.model, folder / "run", method, address)))

    def start(self, folder: Path, last: str) -> subprocess.Popen[bytes]:
        """The pipeline up to the stage `last` on simulated engines, in a session of its own."""
        command = [sys.executable, "-m", "benchmarks.chaos.driver", str(folder / "job.yaml"), last]
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command, cwd=TOP, env=self.environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def environment(self) -> dict[str, str]:
        """Of drivers and nodes: caches of the lab's own."""
        made = os.environ | _RAY | {"XDG_CACHE_HOME": str(self.root / "cache"), "TORCH_EXTENSIONS_DIR": str(self._extensions())}
        made.pop("RAY_ADDRESS", None)
        return made

    def _extensions(self) -> Path:
        """A copy of what DeepSpeed compiled for this user, where there is one.

        torch puts a lock beside it while it loads; that of a process that is killed then stays, and whoever comes waits for ever.
        """
        mine = self.root / "cache" / _EXTENSIONS
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _EXTENSIONS
        theirs = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / f"py{sys.version_info.major}{sys.version_info.minor}_cpu")
        if not mine.is_dir() and theirs.is_dir():
            shutil.copytree(theirs, mine, ignore=shutil.ignore_patterns("lock"))
        return mine


def kill(trial: Trial, scene: Scene, driver: subprocess.Popen[bytes]) -> tuple[Found, str]:
    """Kill the trial's victim in the midst of its work: it is stopped, looked at again, and let go on where it holds none."""
    end, ready = time.monotonic() + MOST_S, 0.0
    while time.monotonic() < end:
        if (code := driver.poll()) is not None:
            if code:
                raise Failed(f"the run ended with {code} before anything was killed: {said(scene.root.parent)}")
            raise Missed(f"{trial.kind}: the run ended before")
        if not ready and scene.reached(trial.where, trial.share):
            ready = time.monotonic() + trial.delay_s
        if ready and time.monotonic() >= ready and (found := scene.look(trial.victim, trial.where)) is not None:
            with suppress(psutil.NoSuchProcess):
                found.process.suspend()
                again = scene.look(trial.victim, trial.where)
                if again is not None and again.process == found.process:
                    named = trial.victim in (DRIVER, CHILD, RAYLET)  # the others' titles say what they do
                    title = trial.victim if named else " ".join(found.process.cmdline()).strip()[:120]
                    found.process.kill()
                    return again, title
                found.process.resume()
        time.sleep(_POLL_S)
    raise Missed(f"{trial.kind}: no victim within {MOST_S:g} s")


def finish(driver: subprocess.Popen[bytes]) -> int:
    """Exit code of a run; one that hangs is ended and has `HUNG`."""
    try:
        return driver.wait(timeout=MOST_S)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
        return HUNG


@contextmanager
def none_left(drivers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """At the end, what is left of the drivers' sessions is killed: Ray's processes outlive a driver for a while."""
    try:
        yield
    finally:
        for driver in drivers:
            _end(driver)


def _end(leader: subprocess.Popen[Any]) -> None:
    """Kill a process and all of its session, which is its own. Children of killed processes are found by that, too."""
    leader.kill()
    leader.wait()
    mine = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader.pid:
                process.kill()
                mine.append(process)
    psutil.wait_procs(mine, timeout=20)


def _as_failed(trial: Trial, seconds: float, failed: Failed) -> dict[str, Any]:
    """The outcome of a trial that did not even come to its kill: it counts, and against ctrlray."""
    known = {"trial": trial.number, "kind": trial.kind, "stage": trial.where.stage, "method": trial.where.method}
    unknown = dict.fromkeys(("killed_s", "seconds_lost", "lost", "twice", "unequal", "unaccounted"))
    return known | unknown | {"victim": "", "work": "", "seconds": seconds, "codes": [], "recovered": "", "said": str(failed)}


@contextmanager
def nodes(wanted: bool, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """A cluster of three nodes, where one is wanted. Raises Missed when it does not start."""
    if not wanted:
        yield Cluster()
        return
    # short, because Ray's sockets lie below it
    with tempfile.TemporaryDirectory(prefix="chaos", dir="/tmp", ignore_cleanup_errors=True) as home:
        everything = {**environment, **_QUICK, "RAY_TMPDIR": home, "PYTHONPATH": str(TOP)}
        command = [sys.executable, "-m", "benchmarks.chaos.nodes"]
        with (Path(home) / "log.txt").open("wb") as log:
            pipes: Mapping[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            started = subprocess.Popen(command, cwd=TOP, env=everything, text=True, start_new_session=True, **pipes)
        try:
            assert started.stdout is not None
            line = next((x for x in started.stdout if x.startswith("{")), "")
            if not line:
                raise Missed(f"the cluster did not start: {(Path(home) / 'log.txt').read_text()[-2000:]}")
            found = json.loads(line)
            yield Cluster(found["address"], tuple(found["raylets"]))
        finally:
            _end(started)


_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that is gone is missed within seconds instead of half a minute; one that is only slow to answer is not."""


def said(folder: Path) -> str:
    """The end of a run's log."""
    return (folder / "log.txt").read_text(errors="replace")[-1500:]
