"""In what two jobs differ, in words."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from ctrlray.config.job import Job

_UNSET = object()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": [1]}}` -> `{"a.b.0": 1}`."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in pairs for k, v in flat(part, f"{path}.{name}" if path else str(name)).items()}
    return {path: value}


def differences(before: Job, after: Job) -> list[str]:
    """Settings in which two jobs differ, as `a.b: old -> new`; an item that came or went is told by its name or type."""
    return sorted(_differences(before.model_dump(mode="json"), after.model_dump(mode="json"), ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        for key in {**old, **new}:
            yield from _differences(old.get(key, _UNSET), new.get(key, _UNSET), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and old and new:
        for i, (was, now) in enumerate(zip_longest(old, new, fillvalue=_UNSET)):
            yield from _differences(was, now, f"{path}.{i}")
    else:
        yield f"{path}: {_told(old)} -> {_told(new)}"


def _told(value: Any) -> str:
    """A setting in few words: of a group of settings what names it."""
    if value is _UNSET:
        return "(unset)"
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict) and (known := value.get("name") or value.get("type")):
        return str(known)
    return str(value)
