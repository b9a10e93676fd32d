"""`ctrlray serve` in a process of its own, on a run that holds an exported tiny model, its level scales and its rewards."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import yaml

from ctrlray import config, models
from ctrlray.control import ControlSpace
from ctrlray.distill import Levels
from ctrlray.pipeline import Run
from ctrlray.stages import export
from tests.e2e.tiny_job import tiny_job

ROOT = Path(__file__).parent.parent.parent
START_S = 420


def make_run(model: Path, root: Path) -> Run:
    """A run as after its export stage; its model is the prepared base, which knows the codes and ignores them."""
    raw = tiny_job(model, root, {"export": {"dtype": "float32", "defaults": {"brevity": 1}}})
    run = Run(config.parse(config.Job, raw, where="test"))
    run.storage.write_bytes(yaml.safe_dump(run.job.model_dump(mode="json"), sort_keys=False).encode(), "job.yaml")
    base = models.prepare(run.job.model, ControlSpace.of(run.job.control))
    folder = Path(run.out("export").path("model"))
    shutil.copytree(base.folder, folder)
    result = export.finish(str(folder), base, run.job, "exmate", {})
    run.out("export").write_json(result.to_dict(), "result.json")
    scales = {"brevity": Levels.fit(range(-300, 0), 2), "variety": Levels.fit(range(100), 2)}
    run.out("distill").write_json({name: scale.to_dict() for name, scale in scales.items()}, "levels.json")
    run.out("distill").write_json({"facts": {}}, "result.json")
    return run


def free_port() -> int:
    """One that nobody is given by the system meanwhile, as Ray's processes are theirs, and that `ray start` gives no worker."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return port


class Server:
    """The process, from its start until `stop`."""

    def __init__(self, run: Run, policy: Path, log: Path, *settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "ctrlray", "serve", run.job.root, "--policy", str(policy), "--port", str(self.port)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self._log = log
        command += [word for s in settings for word in ("--set", s)]
        with log.open("w") as sink:
            shared = {"stdout": sink, "stderr": subprocess.STDOUT, "env": environment}
            self.process = subprocess.Popen(command, start_new_session=True, **shared)

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while "ready" not in self.said():
            assert self.process.poll() is None and time.monotonic() < end, self.said()[-4000:]
            time.sleep(1)

    def said(self) -> str:
        """What stands in its terminal."""
        return self._log.read_text()

    def replicas(self) -> list[psutil.Process]:
        """The vLLM servers' processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in children if "ServeReplica:ctrlray:DialServer" in " ".join(p.cmdline())]

    def stop(self) -> int:
        """Ask it to end; returns its exit status."""
        if self.process.poll() is not None:
            return self.process.returncode
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(90)
        finally:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    def client(self, key: str, timeout: float = 120) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=timeout)
