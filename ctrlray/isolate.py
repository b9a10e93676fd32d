"""Finding the rows that end processes: groups that died are cut into eighths until the guilty row is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SPLIT = 8
"""A group that ended its process is cut into so many."""
DIED = "process_died"
"""Error of a row that ends processes."""
LONE_DEATHS = 2
"""A row that was alone when its process ended is tried once more: a node that is taken away is no row's fault."""


def plan(rows: Sequence[int], died: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Groups to work on after the groups `died` ended their process, once for each time, and the rows to leave out.

    Every row goes into a group an eighth the size of the smallest group that died with it; a row that died alone twice is out.
    The largest groups come first: they are suspected least, and what is finished of them shows that processes do work.
    """
    smallest: dict[int, list[int]] = {}
    for group in sorted(died, key=len, reverse=True):
        smallest |= {row: list(group) for row in group}
    alone = Counter(group[0] for group in died if len(group) == 1)
    killers = [r for r in rows if alone[r] >= LONE_DEATHS]
    together: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        if row not in killers:
            together.setdefault(tuple(smallest.get(row, ())), []).append(row)
    groups = []
    for group, members in together.items():
        size = max(len(group) // SPLIT, 1) if group else len(members)
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return sorted(groups, key=lambda group: (-len(group), group)), killers
