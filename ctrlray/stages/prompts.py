"""Prompts stage: files and data sets in, deduplicated conversations with a train/eval split out."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ctrlray import config, models, schema
from ctrlray.errors import ConfigError
from ctrlray.hh import parse_dialogue
from ctrlray.ledger import Progress, StageResult, count
from ctrlray.schema import Message
from ctrlray.stages.records import Unreadable, json_lines, not_utf8, records
from ctrlray.tables import Storage, from_rows, slices
from ctrlray.telemetry import current, warn_quarantined

_COLUMNS = ("messages", "prompt", "question", "instruction", "text", "turns")


class Row(NamedTuple):
    """One row of a source: its conversation, or the error that keeps it out."""

    name: str
    messages: list[Message] | None
    error: str = ""
    label: str = ""
    """What the source's column `label` says of the prompt; empty where it has none."""


def run(settings: config.Prompts, seed: int, out: Storage, progress: Progress) -> StageResult:
    """Read all sources, drop repeats, pick `train` and `eval` prompts by hash, write the prompts table.

    The split goes by the first human turn: dialogues that open alike are all in one split.
    """
    kept: dict[str, dict[str, Any]] = {}
    dropped: list[str] = []
    bad: list[dict[str, str]] = []
    given = [0] * len(settings.sources)
    for place, row in ((i, r) for i, source in enumerate(settings.sources) for r in read_source(source)):
        given[place] += 1
        if row.messages is None:
            bad.append({"stage": "prompts", "row_id": row.name, "error": "unreadable", "detail": row.error})
            continue
        key = schema.prompt_id(row.messages)
        if key in kept:
            dropped.append("duplicate")
            continue
        kept[key] = {"prompt_id": key, "messages": row.messages, "source": row.name.split("#")[0]}
    empty = [source for source, rows in zip(settings.sources, given, strict=True) if not rows]
    chosen = _split(list(kept.values()), settings, seed, _why_fewer(empty, bad))
    dropped += ["not_needed"] * (len(kept) - len(chosen))
    table = from_rows(sorted(chosen, key=lambda r: r["prompt_id"]), schema.PROMPTS)
    for part in slices(table, schema.PROMPTS_PER_PART):
        out.write_table(part, "prompts", schema.part_of(part["prompt_id"][0].as_py()))
    if bad:
        out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine")
        warn_quarantined(current(), bad)
    progress.total(sum(given))
    progress.advance(sum(given))
    return StageResult(sum(given), len(chosen), count(dropped), {"unreadable": len(bad)} if bad else {})


def _why_fewer(empty: Sequence[config.PromptSource], bad: Sequence[dict[str, str]]) -> str:
    """What keeps prompts out, for the error that there are too few."""
    told = [f"{s.type} {getattr(s, 'path', None) or getattr(s, 'name', '')!r}" for s in empty]
    text = f". No row at all came from {', '.join(told)}" if told else ""
    if bad:
        text += f". {len(bad)} rows could not be read, the first of them {bad[0]['row_id']}: {bad[0]['detail']}"
    return text


def _split(rows: list[dict[str, Any]], settings: config.Prompts, seed: int, why_fewer: str) -> list[dict[str, Any]]:
    """First `eval`, then `train` prompts in the order of a hash of the first human turn, sources taking turns."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        row["_turn"] = schema.first_human_turn(row["messages"])
        by_source.setdefault(row["source"], []).append(row)
    queues = [
        sorted(group, key=lambda r: (schema.digest(seed, "split", r["_turn"]), r["prompt_id"]))
        for _, group in sorted(by_source.items())
    ]
    mixed = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
    side: dict[str, str] = {}
    chosen = []
    room = {"eval": settings.eval, "train": settings.train}
    for row in mixed:
        split = side.get(row["_turn"]) or ("eval" if room["eval"] > 0 else "train")
        if room[split] <= 0:
            continue
        side[row["_turn"]] = split
        room[split] -= 1
        chosen.append({k: v for k, v in row.items() if not k.startswith("_")} | {"split": split})
    if room["eval"] or room["train"]:
        raise ConfigError(
            f"prompts: {settings.train} for training and {settings.eval} for evaluation were asked for, the sources give "
            f"{len(rows)} different ones; lower prompts.train or prompts.eval, or add a source" + why_fewer
        )
    return chosen


def read_source(source: config.PromptSource) -> Iterator[Row]:
    """Rows of one source; a row that cannot be used comes with its error."""
    return map(_checked, _rows(source))


def _rows(source: config.PromptSource) -> Iterator[Row]:
    match source:
        case config.PackagedPrompts():
            text = (resources.files("ctrlray") / "assets" / "prompts.jsonl").read_text(encoding="utf-8")
            for line in text.splitlines():
                raw = json.loads(line)
                yield Row(f"packaged-{raw['source']}#", raw["messages"])
        case config.HHPrompts():
            path = expand(source.path)
            for number, raw in islice(json_lines(path), source.limit):
                yield _hh_row(f"{path.name}#{number}", raw)
        case config.FilePrompts():
            path = expand(source.path)
            for number, raw in records(path, source.limit):
                yield _row(f"{path.name}#{number}", raw, source.column)
        case config.BenchmarkPrompts():
            yield from _rows(benchmark(source))
        case config.HubPrompts():
            for number, raw in enumerate(islice(_streamed(source), source.limit), 1):
                name, dialogue = f"{source.name}#{number}", "chosen" in raw and source.column is None
                yield _hh_row(name, raw) if dialogue else _row(name, raw, source.column)


def _checked(row: Row) -> Row:
    """A row with a text to answer, all of which can be stored; else with what keeps it out."""
    if row.messages is None:
        return row
    asked = [m["content"] for m in row.messages if m["role"] == "user"]
    problem = next((why for text in (row.label, *(m["content"] for m in row.messages)) if (why := not_utf8(text))), None)
    if problem is None and not asked:
        problem = "no user turn to answer; add one, or leave the row out"
    elif problem is None and not asked[-1].strip():
        problem = "the last user turn is empty; fill it, or leave the row out"
    return row._replace(messages=None, error=problem) if problem else row


_BENCHMARKS: dict[str, tuple[str, config.HubPrompts]] = {
    "mt_bench": ("mt_bench_80.jsonl", config.HubPrompts(name="HuggingFaceH4/mt_bench_prompts", column="prompt")),
    "jailbreakbench": (
        "jailbreakbench_100.json",
        config.HubPrompts(name="JailbreakBench/JBB-Behaviors", config="behaviors", split="harmful", column="Goal"),
    ),
    "xstest": ("xstest_prompts.csv", config.HubPrompts(name="Paul/XSTest", column="prompt")),
}


def benchmark(source: config.BenchmarkPrompts) -> config.FilePrompts | config.HubPrompts:
    """Where a published set is read from: its file below `$CTRLRAY_DATA` if that is there, else the hub."""
    name, hub = _BENCHMARKS[source.name]
    file = Path(os.environ.get("CTRLRAY_DATA", "")) / "prompts" / name
    if os.environ.get("CTRLRAY_DATA") and file.is_file():
        return config.FilePrompts(path=str(file), limit=source.limit)
    return hub.model_copy(update={"limit": source.limit})


def expand(path: str) -> Path:
    """A data path with `$CTRLRAY_DATA` and `~` filled in; raises ConfigError when the variable or the file is missing."""
    if "$CTRLRAY_DATA" in path and not os.environ.get("CTRLRAY_DATA"):
        raise ConfigError(f"{path}: the environment variable CTRLRAY_DATA is not set; point it at the folder that holds the data")
    full = Path(os.path.expandvars(path)).expanduser()
    if not full.is_file():
        raise ConfigError(f"prompts.sources: path={path!r}: no such file {full}; correct the path, or put the file there")
    return full


def _hh_row(name: str, raw: Any) -> Row:
    if isinstance(raw, Unreadable):
        return Row(name, None, raw.why)
    try:
        turns = parse_dialogue(raw["chosen"])
    except (ValueError, KeyError, TypeError) as error:
        return Row(name, None, f"{type(error).__name__}: {error}")
    if turns[-1]["role"] != "assistant":
        return Row(name, None, "an HH dialogue ends with the assistant's answer, this one does not; add it, or leave the row out")
    if len(turns) < 2:
        return Row(name, None, "an HH dialogue begins with a human's turn; this one is an answer alone")
    return Row(name, turns[:-1])


def _row(name: str, raw: Any, column: str | None) -> Row:
    if isinstance(raw, Unreadable):
        return Row(name, None, raw.why)
    if not isinstance(raw, dict):
        return Row(name, None, f'expected a record, got {type(raw).__name__}; write it as {{"prompt": text}}')
    key = column or next((c for c in _COLUMNS if c in raw), None)
    if key is None or key not in raw:
        lacks = f"no column {column or ' or '.join(_COLUMNS)}"
        return Row(name, None, f"{lacks}; it has {sorted(map(str, raw))}: name one as the source's column")
    value, label = raw[key], raw["label"] if isinstance(raw.get("label"), str) else ""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[0]  # a list of user turns (MT-bench): the opening
    if isinstance(value, str):
        if not value.strip():
            return Row(name, None, f"{key} is empty; fill it, or leave the row out")
        return Row(name, [Message(role="user", content=value)], label=label)
    return _conversation(name, key, value)._replace(label=label)


def _conversation(name: str, key: str, value: Any) -> Row:
    if not isinstance(value, list) or not value:
        return Row(name, None, f"{key} is {type(value).__name__}, expected text or a list of messages")
    messages = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in schema.ROLES or not isinstance(content, str):
            return Row(name, None, f"{key} holds {reprlib.repr(turn)}, expected role (one of {schema.ROLES}) and content")
        messages.append(Message(role=role, content=content))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return Row(name, messages) if messages else Row(name, None, f"{key} has no turn to answer; end it with a user's turn")


def _streamed(source: config.HubPrompts) -> Iterator[Any]:
    """Rows of a data set on the hub as they come. Raises ConfigError when it is missing or gated, or its host fails."""
    from datasets import load_dataset

    try:
        yield from load_dataset(source.name, source.config, split=source.split, streaming=True)
    except Exception as error:  # the hub, its HTTP client, file systems and formats have no error in common
        what = " ".join(str(error).split())[:600].rstrip(".")
        raise ConfigError(
            f"data set {source.name!r}, split {source.split!r}: {type(error).__name__}: {what}. "
            "Check the name and the network; if it is gated, accept its licence on its page and set HF_TOKEN "
            f"({models.token_sent()})"
        ) from error
