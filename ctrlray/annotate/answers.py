"""Raters' files, read and checked: every rating is used, skipped, missing, or set aside with a reason.

A file is the csv or json that the page downloads, or the csv sheet filled in by hand; commas, semicolons and tabs separate.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctrlray.annotate.sheet import CHOICES, csv_text
from ctrlray.errors import DataError

SKIP = "skip"
_VALUES = {v.lower(): v for v in CHOICES}


class Given(NamedTuple):
    """One rating as a file gives it."""

    file: str
    study: str
    """Empty when the file does not say."""
    rater: str
    item_id: str
    attribute: str
    value: str


class Rating(NamedTuple):
    """One rating that counts."""

    rater: str
    item_id: str
    attribute: str
    value: str
    """A, B or tie."""


class Checked(NamedTuple):
    """All ratings: given = used + skipped + quarantined, the missing ones not among them."""

    num_given: int
    used: list[Rating]
    skipped: list[Rating]
    quarantined: list[tuple[Given, str]]
    """With the reason: other_study, unknown_item, unknown_attribute, bad_value, duplicate, conflict."""
    missing: list[tuple[str, str, str]]
    """Rater, item and attribute without any rating."""

    def counts(self) -> dict[str, Any]:
        """How many of each."""
        reasons = Counter(reason for _, reason in self.quarantined)
        return {
            "given": self.num_given,
            "used": len(self.used),
            "skipped": len(self.skipped),
            "quarantined": dict(sorted(reasons.items())),
            "missing": len(self.missing),
        }


def read(path: Path) -> list[Given]:
    """Every rating of one file; empty cells are none. Raises DataError when it is no file of ratings."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the ratings in {path}: {error}; give a csv or json file in UTF-8") from error
    return _from_json(text, path) if path.suffix.lower() == ".json" else _from_csv(text, path)


def _from_json(text: str, path: Path) -> list[Given]:
    try:
        raw = json.loads(text)
        answers = {str(item): dict(by) for item, by in dict(raw["answers"]).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a json file of ratings ({error!r}); download it from the page again") from error
    study, rater = str(raw.get("study") or ""), str(raw.get("rater") or "").strip() or path.stem
    return [Given(path.name, study, rater, i, str(name), str(v).strip()) for i, by in answers.items() for name, v in by.items()]


def _from_csv(text: str, path: Path) -> list[Given]:
    first = text.split("\n", 1)[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    columns = [c.strip().strip('"') for c in rows.fieldnames or ()]
    rows.fieldnames = columns
    if "item_id" not in columns:
        raise DataError(f"{path}: no column item_id among {columns}; give the sheet or a file that the page downloaded")
    names = [c for c in columns if c not in ("study", "rater", "item_id", "prompt", "answer_a", "answer_b")]
    found = []
    for row in rows:
        study, rater = (row.get("study") or "").strip(), (row.get("rater") or "").strip() or path.stem
        values = {name: (row.get(name) or "").strip() for name in names}
        found += [Given(path.name, study, rater, (row["item_id"] or "").strip(), n, v) for n, v in values.items() if v]
    return found


def check(given: Sequence[Given], key: Mapping[str, Any]) -> Checked:
    """Sort ratings by what becomes of them.

    A rating that is given again alike counts once; ratings of one rater that contradict each other are all set aside.
    """
    items, names = [i["item_id"] for i in key["items"]], list(key["attributes"])
    bad = [(g, reason) for g in given if (reason := _wrong(g, key["study"], set(items), set(names)))]
    refused = {id(g) for g, _ in bad}
    said: dict[tuple[str, str, str], list[Given]] = defaultdict(list)
    for g in given:
        if id(g) not in refused:
            said[g.rater, g.item_id, g.attribute].append(g)
    kept = []
    for (rater, item, name), all_given in said.items():
        values = {_VALUES[g.value.lower()] for g in all_given}
        if len(values) > 1:
            bad += [(g, "conflict") for g in all_given]
            continue
        kept.append(Rating(rater, item, name, values.pop()))
        bad += [(g, "duplicate") for g in all_given[1:]]
    kept.sort()
    raters = sorted({g.rater for g in given if g.study in ("", key["study"])})
    missing = [(r, i, n) for r in raters for i in items for n in names if (r, i, n) not in said]
    used, skipped = [r for r in kept if r.value != SKIP], [r for r in kept if r.value == SKIP]
    return Checked(len(given), used, skipped, bad, missing)


def _wrong(given: Given, study: str, items: set[str], names: set[str]) -> str | None:
    if given.study and given.study != study:
        return "other_study"
    if given.item_id not in items:
        return "unknown_item"
    if given.attribute not in names:
        return "unknown_attribute"
    return None if given.value.lower() in _VALUES else "bad_value"


def quarantine_csv(checked: Checked) -> str:
    """What is not used, one row each with its reason; missing ratings have no file and no value."""
    rows = [
        ("reason", "file", "rater", "item_id", "attribute", "value"),
        *((reason, g.file, g.rater, g.item_id, g.attribute, g.value) for g, reason in checked.quarantined),
        *(("missing", "", *where, "") for where in checked.missing),
    ]
    return csv_text(rows)
