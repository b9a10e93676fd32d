"""`ctrlray submit` and `ray job submit` on a real `ray start --head` with a token: followed, left, stopped, resumed, killed."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml

from tests.e2e.tiny_job import tiny_job

pytestmark = pytest.mark.slow
REWARD = """
def lengths(prompts, responses):
    return {"brevity": [-len(r) for r in responses], "variety": [len(set(r)) for r in responses]}
"""
BIN = Path(sys.executable).parent


class Head(NamedTuple):
    """A cluster of one node."""

    address: str
    environment: dict[str, str]


def await_port(port: int, started: subprocess.Popen[bytes], log: Path) -> None:
    """Until the job server answers."""
    end = time.monotonic() + 240
    while started.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.5)
    pytest.fail(f"the job server did not come up: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def head(private_cache: Path) -> Iterator[Head]:
    home = Path(tempfile.mkdtemp(prefix="ctrl", dir="/tmp"))  # short: Ray's sockets lie below it
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k == "RAY_USAGE_STATS_ENABLED"}
    environment = keep | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(private_cache),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    gcs, board, client, agent = random.sample(range(20_000, 32_000), 4)  # as `free_port` picks them, each another
    command = [BIN / "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={board}", "--num-cpus=2"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={home}/ray"]
    with (home / "log").open("wb") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for port in (board, agent):  # a job is refused for want of its agent after 10 s
            await_port(port, started, home / "log")
        yield Head(f"http://127.0.0.1:{board}", environment)
    finally:
        mine = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        started.terminate()
        _, alive = psutil.wait_procs(mine, timeout=30)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(home, ignore_errors=True)


class Follower:
    """A `ctrlray submit` in another folder than the job's, and what it wrote."""

    def __init__(self, head: Head, job: Path, *words: str) -> None:
        elsewhere = job.parent / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        self.path = elsewhere / f"out-{time.monotonic_ns()}"
        command = [BIN / "ctrlray", "submit", job, "--address", head.address, "--working-dir", job.parent / "code", *words]
        with self.path.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=elsewhere, env=head.environment, stdout=out, stderr=out)

    def text(self) -> str:
        return self.path.read_text()

    def until(self, pattern: str, timeout_s: float = 240) -> re.Match[str]:
        end = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.text(), re.M)) is None:
            assert self.process.poll() is None and time.monotonic() < end, self.text()
            time.sleep(0.2)
        return found

    def code(self, timeout_s: float = 400) -> int:
        return self.process.wait(timeout=timeout_s)


def ray_job(head: Head, job: Path, verb: str, *words: str, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    """`ray job VERB`, as without ctrlray on this side, from another folder than the job's."""
    where = ["--working-dir", str(job.parent / "code")] if verb == "submit" else []
    command = [BIN / "ray", "job", verb, "--address", head.address, *where, *words]
    elsewhere = job.parent / "elsewhere"
    environment = head.environment | {"RAY_AUTH_MODE": "token"}  # which Ray's own command wants to be told
    return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=timeout_s)


def drivers(head: Head, run: Path) -> list[psutil.Process]:
    """Driver processes of the job, without their keeper."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, variables = process.info["cmdline"] or [], process.info["environ"] or {}
        if variables.get("HOME") == head.environment["HOME"] and "pipeline" in words and "--restarts" not in words:
            found.append(process)
    return found


def job_of(tiny: Path, folder: Path, changes: dict[str, object]) -> Path:
    """A job file whose reward is a module in a folder of its own, and a folder to be in that has neither."""
    for name in ("code", "elsewhere"):
        (folder / name).mkdir()
    (folder / "code" / "my_rewards.py").write_text(REWARD)
    reward = {"type": "function", "target": "my_rewards:lengths", "attributes": ["brevity", "variety"]}
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(tiny_job(tiny, folder / "run", {"rewards": [reward], **changes})))
    return job


# many small blocks, so that there is time between the first and the last
SLOW = {"prompts.train": 40, "generate.batch_size": 4, "train.epochs": 1, "evaluate.methods": []}


@pytest.mark.soak
def test_a_job_is_followed_left_stopped_sent_again_and_resumed(head: Head, tiny: Path, tmp_path: Path) -> None:
    root, job = tmp_path / "run", job_of(tiny, tmp_path, SLOW)

    first = Follower(head, job)
    first.until(r"^submitted tiny-\d{8}-\d{6}-\w{4}")
    first.until(r"^generate .*\b[1-9]\d*/\d+ rows")
    first.process.send_signal(signal.SIGINT)
    assert first.code(30) == 130 and "Follow it again: ctrlray submit" in first.text()

    again = Follower(head, job)
    again.until(r"^following tiny-")
    again.until(r"^generate .*\b[1-9]\d*/\d+ rows")  # the log comes from its beginning
    stop = Follower(head, job, "--stop")
    assert stop.code(90) == 0 and "stopped tiny-" in stop.text(), stop.text()
    assert again.code(30) == 143
    kept = {p: p.stat().st_mtime_ns for p in root.glob("generate/*/responses/*")}
    assert kept and not (root / "report.html").exists()

    resumed = Follower(head, job)
    resumed.until(r"^prompts .*finished before, unchanged")
    resumed.until(r"^train ")
    (driver,) = drivers(head, root)
    driver.kill()
    resumed.until("the driver was killed by signal 9; starting it again")
    assert resumed.code() == 0, resumed.text()
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())
    assert len(list(root.glob("*/*/result.json"))) == 8 and list(root.glob("report.html"))
    assert re.search(r"^generate .*finished before, unchanged", resumed.text(), re.M)


def test_a_job_without_ctrlray_on_this_side(head: Head, tiny: Path, tmp_path: Path) -> None:
    """`ray job submit -- ctrlray ...`: what it says, what was done before, and errors stand in `ray job logs`."""
    job = job_of(tiny, tmp_path, {})
    for name in ("first", "again"):
        done = ray_job(head, job, "submit", "--submission-id", name, "--", "ctrlray", "prompts", str(job))
        assert done.returncode == 0, done.stdout + done.stderr
    logs = [ray_job(head, job, "logs", name).stdout for name in ("first", "again")]
    assert re.search(r"^prompts .*\d+/\d+ rows", logs[0], re.M) and "finished before" not in logs[0], logs[0]
    assert re.search(r"^prompts .*finished before, unchanged", logs[1], re.M), logs[1]
    raw = yaml.safe_load(job.read_text())
    job.write_text(yaml.safe_dump(raw | {"train": raw["train"] | {"epochs": "many"}}))
    assert ray_job(head, job, "submit", "--submission-id", "wrong", "--", "ctrlray", "pipeline", str(job)).returncode == 1
    assert "train.epochs" in ray_job(head, job, "logs", "wrong").stdout


@pytest.mark.soak
def test_a_pipeline_of_ray_s_own_command_is_stopped_and_goes_on(head: Head, tiny: Path, tmp_path: Path) -> None:
    root, job = tmp_path / "run", job_of(tiny, tmp_path, SLOW)
    pipeline = ("--", "ctrlray", "pipeline", str(job))
    assert ray_job(head, job, "submit", "--no-wait", "--submission-id", "cut", *pipeline).returncode == 0
    end = time.monotonic() + 240
    while not list(root.glob("generate/*/responses/*.parquet")):
        assert time.monotonic() < end, ray_job(head, job, "logs", "cut").stdout
        time.sleep(0.2)
    assert ray_job(head, job, "stop", "cut").returncode == 0
    kept = {p: p.stat().st_mtime_ns for p in root.glob("generate/*/responses/*.parquet")}
    assert kept and not (root / "report.html").exists()
    done = ray_job(head, job, "submit", "--submission-id", "on", *pipeline, timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())
    assert len(list(root.glob("*/*/result.json"))) == 8 and list(root.glob("report.html"))
    logs = ray_job(head, job, "logs", "on").stdout
    assert re.search(r"^prompts .*finished before, unchanged", logs, re.M) and re.search(r"^report ", logs, re.M), logs
