"""The key of a study: which answer stood on which side, what was asked of it and how it was scored. Raters never get it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ctrlray.annotate.pairs import Answer, Pair
from ctrlray.errors import DataError
from ctrlray.schema import digest

VERSION = 1


def make_key(source: str, run: str, seed: int, attributes: Sequence[tuple[str, str]], pairs: Sequence[Pair]) -> dict[str, Any]:
    """JSON-ready; `attributes` are names with definitions, in control order. The study's identity covers all of it."""
    items = [
        {"item_id": p.item_id, "prompt_id": p.a.prompt_id, "group": p.a.group, "a": _side(p.a), "b": _side(p.b)} for p in pairs
    ]
    inside = {"version": VERSION, "source": source, "run": run, "seed": seed, "attributes": dict(attributes), "items": items}
    return {"study": digest(inside, [[p.a.text, p.b.text] for p in pairs], length=10), **inside}


def _side(answer: Answer) -> dict[str, Any]:
    scores = {who: {n: s if math.isfinite(s) else None for n, s in by.items()} for who, by in answer.scores.items()}
    return {"row_id": answer.row_id, "levels": list(answer.levels), "scores": scores}


def check_key(raw: Any, where: str) -> dict[str, Any]:
    """A key as `make_key` made it. Raises DataError for anything else."""
    known = isinstance(raw, dict) and {"study", "version", "attributes", "items"} <= set(raw)
    if not known:
        raise DataError(f"{where}: not the key of a study; give the key.json that `ctrlray annotate export` wrote")
    if raw["version"] != VERSION:
        raise DataError(f"{where}: key version {raw['version']}, this ctrlray reads {VERSION}; export the study again")
    return dict(raw)
