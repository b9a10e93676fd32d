"""Parts of a sweep as processes of their own: one that fails, hangs or leaks takes nothing with it.

A child holds the read end of a pipe whose write end is its parent's alone. When the parent ends, however it ends, the pipe
closes and the child ends with everything that it started; so a sweep that was killed leaves nobody writing to its run roots.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import yaml

from ctrlray import config

VERB = "part"
"""The hidden verb that a child runs."""
_KEPT_LINES = 200
_ERROR = "error: "
_OF_RAY = re.compile(r"(\x1b\[\d+m)*\((raylet|autoscaler|[\w.:]+ pid=\d+)")
"""How a shared Ray prefixes what its processes log: of several variants at once it would bury what they say."""


class Children:
    """Runs stages of jobs in processes; use as a context manager, which ends those that still run."""

    def __init__(self, say: Callable[[str], None], address: str | None = None) -> None:
        self._say = say
        self._environment = os.environ | ({"RAY_ADDRESS": address} if address else {})
        self._live: set[subprocess.Popen[str]] = set()
        self._over = False
        self._starting = threading.Lock()

    def __enter__(self) -> Children:
        """Make a folder for job files."""
        self._folder = TemporaryDirectory(prefix="ctrlray-sweep-")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End what still runs."""
        with self._starting:
            self._over = True
        for process in list(self._live):
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()
        self._folder.cleanup()

    def run(self, name: str, job: config.Job, stages: Sequence[str]) -> str | None:
        """Run stages of a job; None when they finished, else what went wrong. Its lines are said under `name`."""
        with self._starting:
            if self._over:
                return "the sweep was stopped"
            process = self._start(name, job, stages)
            self._live.add(process)
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        assert process.stdout is not None
        for line in process.stdout:
            if not _OF_RAY.match(line):
                lines.append(line.rstrip("\n"))
                self._say(f"{name:<16} {lines[-1]}")
        code = process.wait()
        self._live.discard(process)
        return None if code == 0 else _reason(lines, code)

    def _start(self, name: str, job: config.Job, stages: Sequence[str]) -> subprocess.Popen[str]:
        file = Path(self._folder.name) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))
        return subprocess.Popen(
            [sys.executable, "-m", "ctrlray", VERB, str(file), *stages],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )


def _reason(lines: Sequence[str], code: int) -> str:
    """From the last `error:` on; else the last line and the exit code."""
    starts = [i for i, line in enumerate(lines) if line.startswith(_ERROR)]
    if starts:
        return "\n".join(list(lines)[starts[-1] :]).removeprefix(_ERROR)
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}: {last}"


def end_with_parent(clear: Callable[[], None]) -> None:
    """In a child: when the pipe from the parent closes, `clear` what was started and end at once."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock a daemon thread would hold at exit
        clear()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
