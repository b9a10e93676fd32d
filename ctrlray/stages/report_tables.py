"""Tables of the report: numbers in, cells of text out. Escaping and layout belong to the page's template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctrlray.stages.report_numbers import (
    NONE,
    bounds,
    duration,
    ends,
    is_number,
    number,
    outside,
    percent,
    percent_bounds,
    point,
)

MAX_ROWS = 100


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a second line in small print, a tone (good, bad, muted) and a bar (share from 0 to 1)."""

    text: str
    note: str = ""
    tone: str = ""
    bar: float | None = None
    method: str = ""
    """A method whose colour mark stands before the text."""
    better_than: tuple[str, ...] = ()
    """Methods that this value is significantly better than."""
    value: Any = None
    """The number or interval behind the text, for who saves the table; without one the text is saved."""
    unit: str = ""
    """Of `value`, where the text words it in others."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: bool = True
    """Cells after the first hold numbers and are set to the right."""
    groups: tuple[tuple[str, int], ...] = ()
    """Headings over several columns: title and number of columns, from the left; none when empty."""

    def data(self) -> list[list[Any]]:
        """Header and rows in full precision, an interval as three columns: `x`, `x, low` and `x, high`."""
        over = [f"{title}: " if title else "" for title, span in self.groups for _ in range(span)] or [""] * len(self.header)
        columns = [[row[i] for row in self.rows] for i in range(len(self.header))]
        wide = [any(isinstance(cell.value, Mapping) for cell in column) for column in columns]
        units = [next((f", {cell.unit}" for cell in column if cell.unit), "") for column in columns]
        titles = [group + title + unit for group, title, unit in zip(over, self.header, units, strict=True)]
        header = [name for title, w in zip(titles, wide, strict=True) for name in _columns(title, w)]
        return [header, *([part for cell, w in zip(row, wide, strict=True) for part in _parts(cell, w)] for row in self.rows)]


def _columns(title: str, wide: bool) -> list[str]:
    return [title, *(f"{title}, {end}" for end in ("low", "high") if wide)]


def _parts(cell: Cell, wide: bool) -> list[Any]:
    if cell.value is not None:
        return list(ends(cell.value))[: 3 if wide else 1]
    text = None if cell.text == NONE else cell.text
    return [text, *[None] * (2 * wide)]


def table(
    caption: str,
    header: Iterable[str],
    rows: Iterable[Iterable[Cell | str]],
    *,
    numeric: bool = True,
    groups: Iterable[tuple[str, int]] = (),
) -> Table:
    """Make a Table; plain strings become cells."""
    cells = tuple(tuple(Cell(c) if isinstance(c, str) else c for c in row) for row in rows)
    return Table(caption, tuple(header), cells, numeric, tuple(groups))


def unaccounted(stage: Mapping[str, Any]) -> int | None:
    """Rows in - (rows out + dropped + quarantined); None when a stage does not count its rows."""
    rows_in, rows_out = stage.get("rows_in"), stage.get("rows_out")
    if not (is_number(rows_in) and is_number(rows_out)):
        return None
    lost = sum((stage.get("dropped") or {}).values()) + sum((stage.get("quarantined") or {}).values())
    return int(rows_in - rows_out - lost)


def ledger_table(ledger: Sequence[Mapping[str, Any]]) -> Table:
    """What ran, and where the rows went."""
    header = ("Stage", "Status", "Rows in", "Rows out", "Dropped", "Quarantined", "Balance")
    return table("Rows in = rows out + dropped + quarantined, for every stage", header, map(_ledger_row, ledger))


def _ledger_row(stage: Mapping[str, Any]) -> list[Cell]:
    missing = unaccounted(stage)
    status = str(stage.get("status") or NONE)
    balance = Cell(NONE) if missing is None else Cell("balances", tone="muted")
    if missing:
        balance = Cell(f"{number(abs(missing))} {'missing' if missing > 0 else 'too many'}", tone="bad")
    return [
        Cell(str(stage.get("stage", NONE))),
        Cell(status, tone="bad" if status in ("failed", "error") else "muted"),
        number_cell(stage.get("rows_in")),
        number_cell(stage.get("rows_out")),
        _counts(stage.get("dropped") or {}),
        _counts(stage.get("quarantined") or {}, tone="bad"),
        balance,
    ]


def _counts(counts: Mapping[str, int], tone: str = "") -> Cell:
    total = sum(counts.values())
    note = ", ".join(f"{number(n)} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)
    return number_cell(total, note=note, tone=tone if total else "")


def total_seconds(ledger: Sequence[Mapping[str, Any]]) -> float:
    """Seconds over all stages that say how long they took."""
    return float(sum(s["seconds"] for s in ledger if is_number(s.get("seconds"))))


def cells_table(attributes: Sequence[str], before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Rows per level cell before and after distillation."""
    keys = sorted({*before, *after}, key=levels_of)
    note = f" First {MAX_ROWS} of {len(keys)} cells." if len(keys) > MAX_ROWS else ""
    return table(
        f"Rows per level cell ({', '.join(attributes)}).{note}",
        ("Cell", "Before", "After"),
        [
            [", ".join(map(str, levels_of(k))), number_cell(before.get(k, 0)), number_cell(after.get(k, 0))]
            for k in keys[:MAX_ROWS]
        ],
    )


def levels_of(cell: str) -> tuple[int, ...]:
    """`"3,1"` becomes (3, 1)."""
    return tuple(int(part) for part in cell.split(","))


def number_cell(value: Any, digits: int = 2, *, note: str = "", tone: str = "") -> Cell:
    """A number, or a value over its interval; whole numbers as they are."""
    shown = value if is_number(value) else point(value)
    tone = tone if shown is not None else "muted"
    return Cell(number(shown, digits), note=note or bounds(value, digits), tone=tone, value=value)


def metric_cell(value: Any, reference: float | None = None, better_than: tuple[str, ...] = (), digits: int = 2) -> Cell:
    """A value over its interval; coloured when a reference is given and lies outside."""
    side = 0 if reference is None else outside(value, reference)
    return replace(number_cell(value, digits, tone={1: "good", -1: "bad", 0: ""}[side]), better_than=better_than)


def percent_cell(value: Any, *, note: str = "") -> Cell:
    """A share in percent over its interval."""
    return Cell(percent(point(value)), note=f"{percent_bounds(value)} {note}".strip(), value=value)


def duration_cell(seconds: Any, *, note: str = "") -> Cell:
    """A duration in words; its data are seconds."""
    return Cell(duration(seconds), note=note, value=seconds, unit="s")


def pairs_table(caption: str, values: Mapping[str, Any]) -> Table:
    """A two-column table of names and values; nested mappings and lists are written out."""
    return table(caption, ("Name", "Value"), [[str(k), _plain(v)] for k, v in flatten(values).items()], numeric=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; an interval stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not {"value", "low", "high"} <= set(value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{number(point(value), 3)} {bounds(value, 3)}".strip()
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(v) for v in value)
    return number(value) if is_number(value) else NONE if value is None else str(value)
