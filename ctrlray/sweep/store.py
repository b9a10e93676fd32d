"""Shared tables of a sweep: sealed when their stage ends, and handed to variants byte for byte.

A seal holds the stage's key and the SHA-256 of each of its files. A variant gets copies, so that its run root is complete
by itself; whatever differs from the seal, on either side, stops the sweep, because its variants would no longer be compared on
the same answers. Answers that were deleted and sampled anew are other answers: finished variants are held against the seal too.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ctrlray.errors import DataError
from ctrlray.pipeline import Run
from ctrlray.sweep.plan import SHARED
from ctrlray.tables import Storage

SEAL, RESULT = "sealed.json", "result.json"
_NOT_KEPT = ("in_flight/", ".")
"""What a run that was cut off leaves beside its tables: notes on work in flight, halves of files."""


def seal(shared: Run) -> None:
    """Record the files of every finished shared stage that has no seal."""
    for stage in SHARED:
        out = shared.out(stage)
        if out.exists(RESULT) and not out.exists(SEAL):
            out.write_json({"stage": stage, "key": shared.keys[stage], "files": _hashes(out)}, SEAL)


def take(shared: Run, variant: Run) -> list[str]:
    """Give a variant the shared stages that it lacks and check those that it has; returns the names of the former.

    Raises DataError when a key or a file, shared or the variant's own, is not the one that was sealed.
    """
    taken = []
    for stage in SHARED:
        sealed = _sealed(shared, stage, variant.keys[stage])
        if variant.result(stage) is None:
            _copy(shared, variant, stage, sealed)
            taken.append(stage)
        else:
            _compare(variant, stage, sealed)
    return taken


def _sealed(shared: Run, stage: str, key: str) -> dict[str, str]:
    out = shared.out(stage)
    if not out.exists(SEAL):
        raise DataError(f"{out.uri} has no {SEAL}: the stage {stage} has not finished there. Run the sweep again")
    record: dict[str, Any] = out.read_json(SEAL)
    if record["key"] != key or shared.keys[stage] != key:
        raise DataError(
            f"{out.uri}: sealed under key {record['key']}, needed is {key}. Delete {shared.storage.uri} and run the sweep again"
        )
    return dict(record["files"])


def _copy(shared: Run, variant: Run, stage: str, sealed: dict[str, str]) -> None:
    """All files, `result.json` last: a stage counts as finished only when everything is there."""
    for name in sorted(sealed, key=lambda n: (n == RESULT, n)):
        variant.out(stage).write_bytes(_checked(shared, stage, name, sealed[name]), *name.split("/"))


def _compare(variant: Run, stage: str, sealed: dict[str, str]) -> None:
    for name, digest in sealed.items():
        if name != RESULT:  # of a variant that ran the stage itself, it tells another time
            _checked(variant, stage, name, digest)


def _checked(run: Run, stage: str, name: str, digest: str) -> bytes:
    """A file's bytes, when they are the sealed ones. Else the whole run is to go: its later stages were made from the file."""
    out, parts = run.out(stage), name.split("/")
    data = out.read_bytes(*parts) if out.exists(*parts) else None
    found = "missing" if data is None else hashlib.sha256(data).hexdigest()
    if data is None or found != digest:
        raise DataError(
            f"{out.path(name)} is not what was sealed when its stage ended (SHA-256 {found[:16]}, sealed {digest[:16]}): "
            f"variants would not be compared on the same answers. Delete {run.storage.uri} and run the sweep again"
        )
    return data


def _hashes(out: Storage) -> dict[str, str]:
    kept = [f for f in out.files() if not f.startswith(_NOT_KEPT) and f != SEAL]
    return {f: hashlib.sha256(out.read_bytes(*f.split("/"))).hexdigest() for f in kept}
