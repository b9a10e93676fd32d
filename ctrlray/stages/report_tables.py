"""Tables of the report: numbers in, cells of text out. Escaping and layout belong to the page's template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
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
        wide = [any(isinstance(row[i].value, Mapping) for row in self.rows) for i in range(len(self.header))]
        header = [name for group, title, w in zip(over, self.header, wide, strict=True) for name in _columns(group + title, w)]
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


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a finite int or float (numpy's floats included), False for None, NaN, text and booleans."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 2) -> str:
    """Two digits and a true minus sign; what is missing or not finite becomes a dash; integers get separators."""
    if not is_number(value):
        return NONE
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def percent(value: Any, digits: int = 0) -> str:
    """`0.634` becomes `63%`."""
    return f"{number(100.0 * value, digits)}%" if is_number(value) else NONE


def interval(value: Any) -> tuple[float, float, float] | None:
    """(value, low, high) of an interval; a bare number is an interval without width; None where one is missing."""
    if isinstance(value, Mapping):
        parts: list[Any] = [value.get(key) for key in ("value", "low", "high")]
        return (parts[0], parts[1], parts[2]) if all(is_number(p) for p in parts) else None
    return (float(value), float(value), float(value)) if is_number(value) else None


def point(value: Any) -> float | None:
    """The value of an interval (also when its bounds are missing) or of a bare number."""
    value = value.get("value") if isinstance(value, Mapping) else value
    return float(value) if is_number(value) else None


def ends(value: Any) -> tuple[float | None, float | None, float | None]:
    """Value, low and high of an interval, each None where it is missing; a bare number has no ends."""
    low, high = (point(value.get(end)) if isinstance(value, Mapping) else None for end in ("low", "high"))
    return point(value), low, high


def bounds(value: Any, digits: int = 2) -> str:
    """`[0.55, 0.70]`, or nothing for a number without an interval."""
    found = interval(value) if isinstance(value, Mapping) else None
    return f"[{number(found[1], digits)}, {number(found[2], digits)}]" if found else ""


def percent_bounds(value: Any) -> str:
    """`[55%, 70%]`, or nothing for a number without an interval."""
    found = interval(value) if isinstance(value, Mapping) else None
    return f"[{percent(found[1])}, {percent(found[2])}]" if found else ""


def outside(value: Any, reference: float) -> int:
    """1 when the whole interval lies above the reference, -1 when below, 0 when it holds it or is missing."""
    found = interval(value)
    if not found or not isinstance(value, Mapping):
        return 0
    return int(found[1] > reference) - int(found[2] < reference)


def duration(seconds: Any) -> str:
    """`4.2 s`, `3 min 05 s` or `2 h 07 min`."""
    if not is_number(seconds):
        return NONE
    if seconds < 59.95:
        return f"{number(float(seconds), 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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
    return Cell(duration(seconds), note=note, value=seconds)


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
