"""One trial: start the pipeline, kill one process in the midst of its work, let the run recover, compare what it made."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
from benchmarks.chaos.plan import DRIVER, LIKELIHOOD, PPO, Trial
from benchmarks.chaos.scene import Found, Scene
from ctrlray.pipeline import STAGES

TOP = Path(__file__).parents[2]
MOST_S = 600.0
"""A run that takes longer hangs."""
MOST_RERUNS = 2
_POLL_S = 0.02
_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Ray's workers are as nice as their driver: on a busy machine they would starve beside it."""
_WHOLE = {LIKELIHOOD: "prompts", PPO: "train"}
"""The first stage of the undisturbed run that a method's trials are compared with; both share the stages before training."""
_MARK = "CTRLRAY_CHAOS"
"""Environment variable of all processes of a run, by which they are found when its driver is gone."""


class Missed(Exception):
    """The run ended before its victim was at work."""


class Cluster(NamedTuple):
    """Nodes on this machine, or none."""

    address: str | None = None
    raylets: tuple[int, ...] = ()


class Lab:
    """A folder with a tiny model, the undisturbed runs, and one folder a trial."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.model = self.root / "model"

    def prepare(self, method: str) -> None:
        """Make the model and the undisturbed run of a job, where they are not there."""
        if not (self.model / "config.json").is_file():
            from tests.fakes import tiny_model

            tiny_model(self.model)
        for needed in dict.fromkeys((LIKELIHOOD, method)):
            if not self._noted(needed, _WHOLE[needed]).is_file():
                self._undisturbed(needed, _WHOLE[needed], self.whole(needed), clustered=False)

    def whole(self, method: str) -> Path:
        """Folder of the undisturbed run that others are compared with."""
        return self.root / "whole" / method

    def undisturbed_s(self, method: str, first: str, *, clustered: bool) -> float:
        """Seconds of an undisturbed run from that stage on, measured when they are first asked for."""
        noted = self._noted(method, first, clustered)
        if not noted.is_file():
            self._undisturbed(method, first, noted.with_suffix(""), clustered=clustered)
        return float(json.loads(noted.read_text())["seconds"])

    def _noted(self, method: str, first: str, clustered: bool = False) -> Path:
        return self.root / "undisturbed" / f"{method}-{first}{'-clustered' if clustered else ''}.json"

    def _undisturbed(self, method: str, first: str, folder: Path, *, clustered: bool) -> None:
        with nodes(clustered, folder) as cluster:
            self.set_up(folder, method, first, cluster.address)
            began = time.monotonic()
            driver = self.start(folder)
            code = finish(driver, folder)
            seconds = time.monotonic() - began
        if code != 0:
            raise RuntimeError(f"the undisturbed run ended with {code}: {said(folder)}")
        difference = compare.differ(compare.rows(folder, method), compare.rows(self.whole(method), method))
        if difference != compare.Difference(0, 0, ()):
            raise RuntimeError(f"two undisturbed runs differ: {difference}")
        noted = self._noted(method, first, clustered)
        noted.parent.mkdir(exist_ok=True)
        noted.write_text(json.dumps({"seconds": seconds}))

    def set_up(self, folder: Path, method: str, first: str, address: str | None) -> None:
        """A job file, and the finished stages before `first`."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for stage in STAGES[: STAGES.index(first)]:
            of = method if stage == "train" else LIKELIHOOD
            shutil.copytree(self.whole(of) / "run" / stage, folder / "run" / stage)
        (folder / "job.yaml").write_text(yaml.safe_dump(job(self.model, folder / "run", method, address)))

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """The pipeline on simulated engines, in a session of its own."""
        environment = os.environ | _RAY | {"XDG_CACHE_HOME": str(self.root / "cache"), _MARK: str(folder)}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "benchmarks.chaos.driver", str(folder / "job.yaml")]
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command, cwd=TOP, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, trial: Trial) -> dict[str, Any]:
        """A trial's outcome. Raises Missed."""
        where, folder = trial.where, self.root / "trials" / f"{trial.number:03d}"
        self.prepare(where.method)
        usual_s = self.undisturbed_s(where.method, where.first, clustered=trial.clustered)
        with nodes(trial.clustered, folder) as cluster:
            self.set_up(folder, where.method, where.first, cluster.address)
            began = time.monotonic()
            driver = self.start(folder)
            scene = Scene(folder / "run", psutil.Process(driver.pid), cluster.raylets)
            with none_left(folder):
                found, title = kill(trial, scene, driver)
                killed_s = time.monotonic() - began
                codes = [finish(driver, folder)]
                while codes[-1] != 0 and len(codes) <= MOST_RERUNS:
                    codes.append(finish(self.start(folder), folder))
            seconds = time.monotonic() - began
        outcome: dict[str, Any] = {
            "trial": trial.number,
            "kind": trial.kind,
            "stage": where.stage,
            "method": where.method,
            "victim": title,
            "work": found.work,
            "killed_s": round(killed_s, 1),
            "codes": codes,
            "recovered": "" if codes[-1] else "rerun" if len(codes) > 1 else "itself",
            "seconds_lost": round(seconds - usual_s, 1),
        }
        return outcome | self.judged(folder, where.method, codes)

    def judged(self, folder: Path, method: str, codes: Sequence[int]) -> dict[str, Any]:
        """What the run made, beside what it should have made; the folder is kept where that is not the same."""
        if codes[-1] != 0:
            return {"lost": None, "twice": None, "unequal": None, "unaccounted": None, "said": said(folder)}
        difference = compare.differ(compare.rows(folder, method), compare.rows(self.whole(method), method))
        unaccounted = compare.unaccounted(folder)
        if difference == compare.Difference(0, 0, ()) and not unaccounted:
            shutil.rmtree(folder)
        return {
            "lost": difference.lost,
            "twice": difference.twice,
            "unequal": list(difference.unequal),
            "unaccounted": unaccounted,
            "said": "",
        }


def kill(trial: Trial, scene: Scene, driver: subprocess.Popen[bytes]) -> tuple[Found, str]:
    """Kill the trial's victim in the midst of its work: it is stopped, looked at again, and let go on where it holds none."""
    end, ready = time.monotonic() + MOST_S, 0.0
    while time.monotonic() < end:
        if driver.poll() is not None:
            raise Missed(f"{trial.kind}: the run ended with {driver.returncode} before")
        if not ready and scene.reached(trial.where, trial.share):
            ready = time.monotonic() + trial.delay_s
        if ready and time.monotonic() >= ready and (found := scene.look(trial.victim, trial.where)) is not None:
            with suppress(psutil.NoSuchProcess):
                found.process.suspend()
                again = scene.look(trial.victim, trial.where)
                if again is not None and again.process == found.process:
                    title = " ".join(found.process.cmdline())[:120] if trial.victim != DRIVER else "driver"
                    found.process.kill()
                    return again, title
                found.process.resume()
        time.sleep(_POLL_S)
    raise Missed(f"{trial.kind}: no victim within {MOST_S:g} s")


def finish(driver: subprocess.Popen[bytes], folder: Path) -> int:
    """Exit code of a run; one that hangs is ended, with all that belongs to it."""
    try:
        return driver.wait(timeout=MOST_S)
    except subprocess.TimeoutExpired:
        _end_of(folder)
        return driver.wait()


@contextmanager
def none_left(folder: Path) -> Iterator[None]:
    """At the end, what is left of a folder's processes is killed: Ray's outlive a driver for a while."""
    try:
        yield
    finally:
        _end_of(folder)


def _end_of(folder: Path) -> None:
    mine = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == str(folder):
                mine.append(process)
    _end(mine)


@contextmanager
def nodes(wanted: bool, folder: Path) -> Iterator[Cluster]:
    """A cluster of three nodes, where one is wanted."""
    if not wanted:
        yield Cluster()
        return
    with tempfile.TemporaryDirectory(prefix="chaos", dir="/tmp") as home:  # short: Ray's sockets lie below it
        environment = os.environ | _RAY | _QUICK | {"RAY_TMPDIR": home, "PYTHONPATH": str(TOP)}
        command = [sys.executable, "-m", "benchmarks.chaos.nodes"]
        with (Path(home) / "log.txt").open("wb") as log:
            pipes: Mapping[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            started = subprocess.Popen(command, cwd=TOP, env=environment, text=True, start_new_session=True, **pipes)
        assert started.stdin is not None and started.stdout is not None
        try:
            line = next((x for x in started.stdout if x.startswith("{")), "")
            if not line:
                raise RuntimeError(f"the cluster did not start: {(Path(home) / 'log.txt').read_text()[-2000:]}")
            found = json.loads(line)
            yield Cluster(found["address"], tuple(found["raylets"]))
        finally:
            family = psutil.Process(started.pid).children(recursive=True)
            with suppress(BrokenPipeError):
                started.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                started.wait(timeout=60)
            _end(family)
            started.kill()
            started.wait()


_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that is gone is missed within seconds instead of half a minute."""


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)


def said(folder: Path) -> str:
    """The end of a run's log."""
    return (folder / "log.txt").read_text(errors="replace")[-1500:]
