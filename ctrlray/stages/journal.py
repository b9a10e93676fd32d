"""What an actor was working on when its process died, so that a row which kills processes is found and set aside.

    batch of 96 ─► dies ─► restarted: groups of 12 ─► one dies ─► groups of 1 ─► one dies, twice ─► that row is quarantined

A note of each group is written before work on it begins and erased when it is done. Notes that are left when the same
batch comes again (Ray retries it on the restarted actor) are groups that ended their process.

Deaths are bounded by what comes of them. A process that ends counts as long as no row of its batch is finished, and whatever an
actor finishes makes its count begin anew: rows that kill cost as many processes as it takes to find them, one that ends on
everything ends the stage after `max_restarts`.

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

from ctrlray.errors import ClusterError
from ctrlray.isolate import plan
from ctrlray.schema import QUARANTINE, digest
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import Where, warn_quarantined

T = TypeVar("T")
IN_FLIGHT = "in_flight"
"""Folder of the notes beside a stage's tables."""


class Journal:
    """Notes on work in flight below one storage folder. Picklable."""

    def __init__(self, out: Storage) -> None:
        self._out = out
        self._current: tuple[str, str, dict[str, Any]] | None = None
        self._ended = self._max_restarts = 0
        self._actor = self._count = self._began = self._before = ""

    def clear(self) -> None:
        """Forget all notes: at the start of a run, those of a run that was killed as a whole say nothing about rows."""
        if self._out.exists():
            self._out.delete()

    def start(self, max_restarts: int) -> bool:
        """Count an actor's process, before anything that may end it. False where it need not go on, because `run` will refuse.

        That is so when the actor's processes ended more than `max_restarts` times in a row, with nothing finished in between.
        """
        self._max_restarts, self._actor = max_restarts, _actor()
        self._count = f"{self._actor}.ended"
        self._began = self._before = _now()
        try:
            ended, self._before = self._out.read_bytes(self._count).decode().split()
            self._ended = 1 + int(ended)
        except FileNotFoundError:
            self._ended = 0
        self._out.write_bytes(f"{self._ended} {self._began}".encode(), self._count)
        return self._ended <= max_restarts

    def run(
        self,
        ids: Sequence[str],
        work: Callable[[list[int]], T],
        done: Callable[[], Collection[str]] = tuple,
        aside: Callable[[str, str], object] = lambda row, words: None,
    ) -> tuple[list[T], dict[int, str]]:
        """`work` on groups of row numbers that together cover all rows but those that end processes.

        Returns the results, those of large groups first, and the numbers of the rows that were left out because each, alone,
        ended a process, with what it said before it ended. `done` gives the ids whose results were kept before a process ended;
        it is asked only after one did. `aside(id, words)` is told of each row that is left out, once, as soon as other rows of
        the batch are finished: before that it may be the process that ends on everything. Raises ClusterError when too many
        processes ended; see `start`.
        """
        batch = digest(list(ids))
        who = f"{socket.gethostname()}:{os.getpid()}"
        left = [note | {"process": who} for note in self._notes(batch)]
        if self._ended > self._max_restarts:
            raise self._over()
        kept = set(done()) if left else set()
        for note in left:
            self._out.write_json(note, batch, _name(note["rows"]))
        died = [n["rows"] for n in left for _ in range(n["deaths"])]
        groups, killers = plan([i for i, key in enumerate(ids) if key not in kept], died)
        alone = {n["rows"][0]: n for n in left if len(n["rows"]) == 1}
        guilty = {i: alone[i]["error"] or _SILENT for i in killers}

        def tell() -> None:
            for i, words in guilty.items():
                if not alone[i]["aside"]:
                    aside(ids[i], words)
                    alone[i]["aside"] = True
                    self._out.write_json(alone[i], batch, _name([i]))

        if kept:
            self._finished()
            tell()
        results: list[T] = []
        for group in groups:
            name = _name(group)
            deaths = 1 + max((n["deaths"] for n in left if n["rows"] == group), default=0)  # if this one ends its process too
            note = {"rows": group, "first": ids[group[0]], "actor": self._actor, "process": who, "deaths": deaths}
            note |= {"error": "", "aside": False}
            self._out.write_json(note | {"since": _now()}, batch, name)
            self._current = (batch, name, note)
            try:
                results.append(work(group))
            except Exception:  # an error is not a death: whoever catches it decides
                self._erase(batch, name)
                raise
            self._erase(batch, name)
            self._finished()
            tell()
        tell()
        return results, guilty

    def _finished(self) -> None:
        """Rows are finished, so the deaths before were not those of a process that ends on everything."""
        if self._ended:
            self._ended = 0
            self._out.write_bytes(f"0 {self._began}".encode(), self._count)

    def _over(self) -> ClusterError:
        """The error of this actor, given up, with what its last process said, on any batch: Ray may hand it another now."""
        left = [n for batch in self._out.folders() for n in self._notes(batch)]
        own = [n for n in left if n["actor"] == self._actor and n["since"] >= self._before]
        last = max(own, key=lambda n: str(n["since"]), default={"error": _IDLE})
        isolated = sum(n["aside"] for n in left)
        return ClusterError(
            f"an actor's process ended {self._ended} times in a row and finished nothing in between, more than "
            f"pool.max_restarts={self._max_restarts} allows; the last one with: {last['error'] or _SILENT}. What is finished is "
            f"kept, and {isolated} rows that ended a process alone are quarantined. Mend that, or raise pool.max_restarts, and "
            "run the same command again: it goes on from there."
        )

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
        """Notes of rows that are not set aside, oldest first: `rows`, `first` (an id), `process`, `since` (UTC), `error`, ..."""
        found = [n for batch in self._out.folders() for n in self._notes(batch) if not n["aside"]]
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
_IDLE = "the process ended before it took up work; see the actor's log in Ray's session folder"


def _name(group: Sequence[int]) -> str:
    return f"{group[0]:06d}-{len(group):06d}.json"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _actor() -> str:
    """An id that an actor keeps when it is started anew."""
    import ray

    context = ray.get_runtime_context() if ray.is_initialized() else None
    return (context and context.get_actor_id()) or "no-actor"


def set_aside(out: Storage, where: Where, stage: str, row: str, error: str, detail: str) -> None:
    """Quarantine one row as soon as its fault is known, in a part of its own, and say so."""
    bad = [{"stage": stage, "row_id": row, "error": error, "detail": detail}]
    out.write_table(from_rows(bad, QUARANTINE), "quarantine", f"part-{digest([row])}")
    warn_quarantined(where, bad)
