"""Numbers of the report in words and signs: values with their intervals, shares and durations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


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
