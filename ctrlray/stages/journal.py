"""What an actor was working on when its process died, so that a row which kills processes is found and set aside.

    batch of 96 ─► dies ─► restarted: groups of 12 ─► one dies ─► groups of 1 ─► one dies ─► that row is quarantined

A note of each group is written before work on it begins and erased when it is done. Notes that are left when the same
batch comes again (Ray retries it on the restarted actor) are groups that ended their process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from ctrlray.schema import digest
from ctrlray.tables import Storage

T = TypeVar("T")
SPLIT = 8
"""A group that ended its process is cut into so many."""
IN_FLIGHT = "in_flight"
"""Folder of the notes beside a stage's tables."""
DIED = "process_died"
"""Error under which such rows are quarantined."""


class Journal:
    """Notes on work in flight below one storage folder. Picklable."""

    def __init__(self, out: Storage) -> None:
        self._out = out

    def clear(self) -> None:
        """Forget all notes: at the start of a run, those of a run that was killed as a whole say nothing about rows."""
        if self._out.exists():
            self._out.delete()

    def run(
        self, ids: Sequence[str], work: Callable[[list[int]], T], done: Callable[[], Collection[str]] = tuple
    ) -> tuple[list[T], list[int]]:
        """`work` on groups of row numbers that together cover all rows but those that end processes.

        Returns the results in order, and the numbers of the rows that were left out because each, alone, ended a process.
        `done` gives the ids whose results were kept before a process ended; it is asked only after one did.
        """
        batch = digest(list(ids))
        died = self._left(batch)
        kept = set(done()) if died else set()
        groups, killers = plan([i for i, key in enumerate(ids) if key not in kept], died)
        results = []
        for group in groups:
            name = f"{group[0]:06d}-{len(group):06d}.json"
            self._out.write_json(group, batch, name)
            try:
                results.append(work(group))
            except Exception:  # an error is not a death: whoever catches it decides
                self._out.remove(batch, name)
                raise
            self._out.remove(batch, name)
        return results, killers

    def _left(self, batch: str) -> list[list[int]]:
        return [self._out.read_json(batch, n) for n in self._out.names(batch, suffix=".json")]


def plan(rows: Sequence[int], died: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Groups to work on after the groups `died` ended their process, and the rows to leave out.

    Every row goes into a group an eighth the size of the smallest group that died with it; a row that died alone is out.
    """
    smallest: dict[int, list[int]] = {}
    for group in sorted(died, key=len, reverse=True):
        smallest |= {row: list(group) for row in group}
    killers = [r for r in rows if len(smallest.get(r, ())) == 1]
    together: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        if row not in killers:
            together.setdefault(tuple(smallest.get(row, ())), []).append(row)
    groups = []
    for group, members in together.items():
        size = max(len(group) // SPLIT, 1) if group else len(members)
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return sorted(groups), killers
