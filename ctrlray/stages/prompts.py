"""Prompts stage: files and data sets in, deduplicated conversations with a train/eval split out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from ctrlray import config, schema
from ctrlray.errors import ConfigError, DataError
from ctrlray.hh import parse_dialogue
from ctrlray.ledger import Progress, StageResult, count
from ctrlray.schema import Message
from ctrlray.tables import Storage, from_rows, slices

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
    rows_in = 0
    for row in (r for source in settings.sources for r in read_source(source)):
        rows_in += 1
        if row.messages is None:
            bad.append({"stage": "prompts", "row_id": row.name, "error": "unreadable", "detail": row.error})
            continue
        key = schema.prompt_id(row.messages)
        if key in kept:
            dropped.append("duplicate")
            continue
        kept[key] = {"prompt_id": key, "messages": row.messages, "source": row.name.split("#")[0]}
    chosen = _split(list(kept.values()), settings, seed)
    dropped += ["not_needed"] * (len(kept) - len(chosen))
    table = from_rows(sorted(chosen, key=lambda r: r["prompt_id"]), schema.PROMPTS)
    for part in slices(table, schema.PROMPTS_PER_PART):
        out.write_table(part, "prompts", schema.part_of(part["prompt_id"][0].as_py()))
    if bad:
        out.write_table(from_rows(bad, schema.QUARANTINE), "quarantine")
    progress.total(rows_in)
    progress.advance(rows_in)
    return StageResult(rows_in, len(chosen), count(dropped), {"unreadable": len(bad)} if bad else {})


def _split(rows: list[dict[str, Any]], settings: config.Prompts, seed: int) -> list[dict[str, Any]]:
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
            f"{len(rows)} different ones; lower prompts.train or prompts.eval, or add a source"
        )
    return chosen


def read_source(source: config.PromptSource) -> Iterator[Row]:
    """Rows of one source; a row that cannot be read comes with its error."""
    match source:
        case config.PackagedPrompts():
            text = (resources.files("ctrlray") / "assets" / "prompts.jsonl").read_text(encoding="utf-8")
            for line in text.splitlines():
                raw = json.loads(line)
                yield Row(f"packaged-{raw['source']}#", raw["messages"])
        case config.HHPrompts():
            path = expand(source.path)
            for number, line in _numbered(path, source.limit):
                yield _hh_row(f"{path.name}#{number}", line)
        case config.FilePrompts():
            path = expand(source.path)
            for number, raw in _records(path, source.limit):
                yield _row(f"{path.name}#{number}", raw, source.column)
        case config.BenchmarkPrompts():
            yield from read_source(benchmark(source))
        case config.HubPrompts():
            yield from _hub_rows(source)


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


def _hh_row(name: str, line: str) -> Row:
    try:
        turns = parse_dialogue(json.loads(line)["chosen"])
    except (ValueError, KeyError, TypeError) as error:
        return Row(name, None, f"{type(error).__name__}: {error}")
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        return Row(name, None, "an HH dialogue ends with the assistant's answer; this one does not")
    return Row(name, turns[:-1])


def _row(name: str, raw: Any, column: str | None) -> Row:
    if not isinstance(raw, dict):
        return Row(name, None, f"expected a record, got {type(raw).__name__}")
    key = column or next((c for c in _COLUMNS if c in raw), None)
    if key is None or key not in raw:
        return Row(name, None, f"no column {column or ' or '.join(_COLUMNS)}; it has {sorted(map(str, raw))}")
    value, label = raw[key], raw["label"] if isinstance(raw.get("label"), str) else ""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[0]  # a list of user turns (MT-bench): the opening
    if isinstance(value, str):
        asked = [Message(role="user", content=value)]
        return Row(name, asked, label=label) if value.strip() else Row(name, None, f"{key} is empty")
    return _conversation(name, key, value)._replace(label=label)


def _conversation(name: str, key: str, value: Any) -> Row:
    if not isinstance(value, list) or not value:
        return Row(name, None, f"{key} is {type(value).__name__}, expected text or a list of messages")
    messages = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in schema.ROLES or not isinstance(content, str):
            return Row(name, None, f"{key} holds {str(turn)[:80]!r}, expected role (one of {schema.ROLES}) and content")
        messages.append(Message(role=role, content=content))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return Row(name, messages) if messages else Row(name, None, f"{key} has no turn to answer")


def _numbered(path: Path, limit: int | None) -> Iterator[tuple[int, str]]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: broken gzip ({error}); fetch the file again") from error
    lines = data.decode("utf-8", "replace").split("\n")
    filled = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    yield from filled[:limit]


def _records(path: Path, limit: int | None) -> Iterator[tuple[int, Any]]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from enumerate(pq.read_table(path).to_pylist()[:limit], 1)
    elif name.endswith(".csv"):
        text = "\n".join(line for _, line in _numbered(path, None))
        yield from enumerate(list(csv.DictReader(io.StringIO(text)))[:limit], 1)
    elif name.endswith(".json"):
        whole = json.loads(path.read_text(encoding="utf-8"))
        yield from enumerate((whole if isinstance(whole, list) else [whole])[:limit], 1)
    elif name.endswith(".jsonl"):
        for number, line in _numbered(path, limit):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, f"not JSON: {error}"
    else:
        raise ConfigError(f"{path}: unknown ending; prompts come as .jsonl, .jsonl.gz, .json, .csv or .parquet")


def _hub_rows(source: config.HubPrompts) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.name, source.config, split=source.split, streaming=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data set {source.name!r}: {error}. Check the name, the network, and HF_TOKEN if it is gated"
        ) from error
    for number, raw in enumerate(rows, 1):
        if source.limit and number > source.limit:
            return
        name = f"{source.name}#{number}"
        yield _hh_row(name, json.dumps(raw)) if "chosen" in raw and source.column is None else _row(name, raw, source.column)
