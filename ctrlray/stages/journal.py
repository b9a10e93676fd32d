"""What an actor was working on when its process died, so that a row which kills processes is found and set aside.

    batch of 96 ─► dies ─► restarted: groups of 12 ─► one dies ─► groups of 1 ─► one dies, twice ─► that row is quarantined

A note of each group is written before work on it begins and erased when it is done. Notes that are left when the same
batch comes again (Ray retries it on the restarted actor) are groups that ended their process.

A process may be taken for dead and yet live on, cut off with its node. Whoever takes its place puts their own name on its
notes, and a new run erases them: a process whose note is no longer its own keeps what it made to itself.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from ctrlray.isolate import plan
from ctrlray.schema import digest
from ctrlray.tables import Storage

T = TypeVar("T")
IN_FLIGHT = "in_flight"
"""Folder of the notes beside a stage's tables."""


class Journal:
    """Notes on work in flight below one storage folder. Picklable."""

    def __init__(self, out: Storage) -> None:
        self._out = out
        self._current: tuple[str, str, dict[str, Any]] | None = None

    def clear(self) -> None:
        """Forget all notes: at the start of a run, those of a run that was killed as a whole say nothing about rows."""
        if self._out.exists():
            self._out.delete()

    def run(
        self, ids: Sequence[str], work: Callable[[list[int]], T], done: Callable[[], Collection[str]] = tuple
    ) -> tuple[list[T], dict[int, str]]:
        """`work` on groups of row numbers that together cover all rows but those that end processes.

        Returns the results in order, and the numbers of the rows that were left out because each, alone, ended a process,
        with what it said before it ended. `done` gives the ids whose results were kept before a process ended; it is asked
        only after one did.
        """
        batch = digest(list(ids))
        left = self._notes(batch)
        kept = set(done()) if left else set()
        who = f"{socket.gethostname()}:{os.getpid()}"
        for note in left:
            self._out.write_json(note | {"process": who}, batch, _name(note["rows"]))
        died = [n["rows"] for n in left for _ in range(n["deaths"])]
        groups, killers = plan([i for i, key in enumerate(ids) if key not in kept], died)
        words = {n["rows"][0]: n["error"] for n in left if len(n["rows"]) == 1}
        results = []
        for group in groups:
            name = _name(group)
            deaths = 1 + max((n["deaths"] for n in left if n["rows"] == group), default=0)  # if this one ends its process too
            note = {"rows": group, "first": ids[group[0]], "process": who, "deaths": deaths, "error": ""}
            self._out.write_json(note | {"since": _now()}, batch, name)
            self._current = (batch, name, note)
            try:
                results.append(work(group))
            except Exception:  # an error is not a death: whoever catches it decides
                self._erase(batch, name)
                raise
            self._erase(batch, name)
        return results, {i: words[i] or _SILENT for i in killers}

    def holds(self) -> bool:
        """Whether the group in hand is still this process's own."""
        assert self._current is not None
        batch, name, note = self._current
        try:
            return bool(self._out.read_json(batch, name)["process"] == note["process"])
        except FileNotFoundError:
            return False

    def die(self, error: BaseException) -> None:
        """Note what went wrong with the group in hand and end this process: what it holds is in an unknown state."""
        assert self._current is not None
        batch, name, note = self._current
        self._out.write_json(note | {"error": f"{type(error).__name__}: {error}"[:2000], "since": _now()}, batch, name)
        os._exit(1)

    def in_flight(self) -> list[dict[str, Any]]:
        """All notes, oldest first: `rows`, `first` (an id), `process`, `since` (UTC), `deaths`, `error`."""
        found = [n for batch in self._out.folders() for n in self._notes(batch)]
        return sorted(found, key=lambda n: str(n["since"]))

    def _erase(self, batch: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # by another, who took this process for dead
            self._out.remove(batch, name)

    def _notes(self, batch: str) -> list[dict[str, Any]]:
        found = []
        for name in self._out.names(batch, suffix=".json"):
            with contextlib.suppress(FileNotFoundError):  # erased since it was listed: that group is done
                found.append(self._out.read_json(batch, name))
        return found


_SILENT = "the process ended without a word; see the actor's log in Ray's session folder"


def _name(group: Sequence[int]) -> str:
    return f"{group[0]:06d}-{len(group):06d}.json"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
