"""How long a stage took, over every attempt at it: what a killed run spent before is part of what its result cost.

A stage's storage holds `time.json`, the seconds of all attempts so far, under `starts/` one note per engine start, and under
`took/` the seconds of its parts.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping
from types import TracebackType

from ctrlray.errors import StorageError
from ctrlray.ledger import Progress
from ctrlray.tables import Storage

FILE, STARTS, TOOK = "time.json", "starts", "took"
KEEP_S = 15.0
"""A kill loses at most this much of the count, and what passed since the last sign of progress."""


class Clock:
    """A stage's progress, timed; use as a context manager around the stage."""

    def __init__(self, progress: Progress, out: Storage) -> None:
        self._progress, self._out = progress, out
        self._earlier = float(out.read_json(FILE)["seconds"]) if out.exists(FILE) else 0.0
        self._began = self._kept = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of all attempts, up to now."""
        return self._earlier + time.monotonic() - self._began

    def __enter__(self) -> Clock:
        """Nothing to set up: the count began when the clock was made."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Keep what an attempt took that failed; the result of one that did not says it itself."""
        if kind is not None:
            with contextlib.suppress(StorageError):  # where it fails, the error on its way says more
                self._keep(0.0)

    def total(self, rows: int) -> None:
        """Pass on."""
        self._progress.total(rows)

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Pass on."""
        self._progress.advance(rows, tokens)
        self._keep(KEEP_S)

    def note(self, text: str) -> None:
        """Pass on."""
        self._progress.note(text)
        self._keep(KEEP_S)

    def measure(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Pass on."""
        self._progress.measure(name, step, values)
        self._keep(KEEP_S)

    def _keep(self, after_s: float) -> None:
        now = time.monotonic()
        if now - self._kept >= after_s:
            self._kept = now
            self._out.write_json({"seconds": round(self.seconds, 1)}, FILE)


class Lap:
    """Seconds of one part of a stage over every attempt, kept whenever what it made is kept."""

    def __init__(self, out: Storage, part: str) -> None:
        self._out, self._part = out, part
        self._earlier, self._began = lap_seconds(out, part), time.monotonic()

    def keep(self) -> None:
        """What came up to now is there, and so is what it took."""
        seconds = self._earlier + time.monotonic() - self._began
        self._out.write_json({"seconds": round(seconds, 2)}, TOOK, f"{self._part}.json")


def lap_seconds(out: Storage, part: str) -> float:
    """Seconds of a part of a stage, over every attempt; 0 where none was kept."""
    name = f"{part}.json"
    return float(out.read_json(TOOK, name)["seconds"]) if out.exists(TOOK, name) else 0.0


def note_start(out: Storage, seconds: float) -> None:
    """Note that an engine of this stage took so long to start."""
    out.write_json({"seconds": round(seconds, 1)}, STARTS, f"{uuid.uuid4().hex[:12]}.json")


def start_seconds(out: Storage) -> float:
    """Seconds of all engine starts that were noted, over every attempt."""
    return float(sum(out.read_json(STARTS, name)["seconds"] for name in out.names(STARTS)))
