"""Finding the rows that end processes: groups that died are cut into eighths until the guilty row is alone."""

from __future__ import annotations

from collections.abc import Sequence

SPLIT = 8
"""A group that ended its process is cut into so many."""


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
