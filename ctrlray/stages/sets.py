"""Prompt sets of the evaluation: which prompts of a set are asked, and what became of the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from ctrlray import config, schema
from ctrlray.errors import DataError
from ctrlray.ledger import count
from ctrlray.stages.prompts import Row, read_source
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import current, warn_quarantined

FOLDER = "sets"
LABELS = ("safe", "unsafe")
ACCOUNTS = "accounts.json"
TOO_LONG = "prompt_too_long"
"""Error of a prompt that leaves no room for an answer."""


class Asked(NamedTuple):
    """Prompts that the grid is asked of, and where their answers go."""

    name: str
    """Empty for the run's own held-out prompts."""
    prompts: list[dict[str, Any]]
    out: Storage


Fits = Callable[[Sequence[schema.Message]], bool]
"""Whether a conversation leaves room for an answer; DataError where it cannot be rendered."""


def read(wanted: config.PromptSet, seed: int, trained_on: Collection[str], fits: Fits, out: Storage) -> Asked:
    """The prompts of a set, by prompt_id; those that an earlier attempt chose where there was one.

    `trained_on` are the first human turns of the training prompts: prompts that open alike are dropped. Writes the table
    `prompts`, a quarantine of rows that cannot be used, and `accounts.json`: rows = prompts + dropped + quarantined.
    """
    if not out.exists(ACCOUNTS):
        _choose(wanted, seed, trained_on, fits, out)
    return Asked(wanted.name, out.read_table("prompts", schema.SET_PROMPTS).to_pylist(), out)


def _choose(wanted: config.PromptSet, seed: int, trained_on: Collection[str], fits: Fits, out: Storage) -> None:
    kept: dict[str, dict[str, Any]] = {}
    dropped: list[str] = []
    bad: list[dict[str, str]] = []
    for row in (r for source in wanted.sources for r in read_source(source)):
        if problem := _problem(wanted, row, fits):
            bad.append({"stage": "evaluate", "row_id": row.name, "error": problem[0], "detail": problem[1]})
            continue
        assert row.messages is not None
        key = schema.prompt_id(row.messages)
        if key in kept or schema.first_human_turn(row.messages) in trained_on:
            dropped.append("duplicate" if key in kept else "in_training")
            continue
        kept[key] = {"prompt_id": key, "messages": row.messages, "source": row.name.split("#")[0], "label": row.label}
    chosen = _limited(list(kept.values()), wanted, seed)
    dropped += ["over_limit"] * (len(kept) - len(chosen))
    accounts = {"rows": len(chosen) + len(dropped) + len(bad), "prompts": len(chosen), "dropped": count(dropped)}
    accounts["quarantined"] = count([b["error"] for b in bad])
    if not chosen:
        raise DataError(f"evaluate.sets.{wanted.name}: none of {accounts['rows']} rows can be asked: {accounts}; add a source")
    if bad:
        out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine")
        warn_quarantined(current(), bad)
    out.write_table(from_rows(sorted(chosen, key=lambda r: r["prompt_id"]), schema.SET_PROMPTS), "prompts")
    out.write_json(accounts, ACCOUNTS)


def _problem(wanted: config.PromptSet, row: Row, fits: Fits) -> tuple[str, str] | None:
    """Why a row cannot be asked, as error and detail."""
    if row.messages is None:
        return "unreadable", row.error
    if wanted.role == "over_refusal" and row.label not in LABELS:
        return "unlabelled", f"label={row.label!r}, which must be one of {LABELS} for refusals to be counted"
    try:
        fitting = fits(row.messages)
    except DataError as error:
        return schema.SPECIAL_TOKENS, str(error)
    return None if fitting else (TOO_LONG, "it leaves no room for an answer; raise model.max_context")


def _limited(rows: Sequence[dict[str, Any]], wanted: config.PromptSet, seed: int) -> list[dict[str, Any]]:
    """At most `limit` rows in the order of a hash, sources and labels taking turns."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["label"]), []).append(row)
    queues = [sorted(groups[k], key=lambda r: schema.digest(seed, "set", r["prompt_id"])) for k in sorted(groups)]
    mixed = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
    return mixed[: wanted.limit]
