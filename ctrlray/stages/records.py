"""Rows of files: jsonl, json, csv and parquet, each also gzipped. A row that cannot be read leaves its reason in its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ctrlray.errors import ConfigError, DataError

LONGEST_FIELD = 1 << 26
"""Characters of a CSV field; csv's own limit of 131,072 is shorter than prompts may be."""


class Unreadable(NamedTuple):
    """Stands where a row cannot be read."""

    why: str


Numbered = Iterator[tuple[int, Any]]
"""Rows with their numbers from 1; those of jsonl are the numbers of their lines."""


def records(path: Path, limit: int | None = None) -> Numbered:
    """The first rows of a file whose format is told by its ending. Raises ConfigError for others, DataError for damaged files."""
    readers = {".jsonl": json_lines, ".json": _whole_json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(Path(path.name.removesuffix(".gz")).suffix)
    if reader is None:
        raise ConfigError(f"{path}: unknown ending; prompts come as .jsonl, .json, .csv or .parquet, or one of these with .gz")
    yield from islice(reader(path), limit)


def json_lines(path: Path) -> Numbered:
    """The value of each line that is not blank."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, _json(line)


def not_utf8(text: str, *, raw: bool = False) -> str | None:
    """Why a text cannot be written as UTF-8, or None. `raw`: it was read as it stands, so what is no UTF-8 was a byte."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character, before = text[error.start], text[max(0, error.start - 20) : error.start]
        what = f"byte 0x{ord(character) & 0xFF:02x}" if raw else f"{character!r}, half of a surrogate pair,"
        return f"not UTF-8: {what} after {before!r}; write it as UTF-8"
    return None


def _content(path: Path) -> bytes:
    """A file's bytes, unpacked."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); make it readable, or correct the path") from error
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip ({error}); fetch the file again") from error


def _text(path: Path) -> str:
    """A file's text; bytes that are no UTF-8 stay in it as lone surrogates, so that only the rows that hold them are lost."""
    return _content(path).decode("utf-8-sig", "surrogateescape")


def _json(line: str) -> Any:
    if problem := not_utf8(line, raw=True):
        return Unreadable(problem)
    try:
        return json.loads(line)
    except RecursionError:
        return Unreadable("not JSON that can be read: it is nested too deep; write it flatter")
    except ValueError as error:
        return Unreadable(f"not JSON: {error}; write one value on each line")


def _whole_json(path: Path) -> Numbered:
    text = _text(path)
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
        if not_utf8(text, raw=True):
            broken = [not_utf8(json.dumps(row, ensure_ascii=False), raw=True) for row in rows]
            rows = [Unreadable(why) if why else row for row, why in zip(rows, broken, strict=True)]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not one JSON value ({error}); write it again, or name it .jsonl if each line is one") from error
    yield from enumerate(rows, 1)


def _csv(path: Path) -> Numbered:
    header: list[str] = []
    for number, (line, cells) in enumerate(_csv_rows(path)):
        if number == 0:
            header = cells
        else:
            yield number, _named(header, cells, line)


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line that it begins in."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows, begins = [], 1
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        for cells in reader:
            if cells and not (len(cells) == 1 and cells[0].isspace()):
                rows.append((begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: the row that begins in line {begins} is broken ({error}); close its quotes, and double those inside of them"
        ) from error
    finally:
        csv.field_size_limit(before)
    return rows


def _named(header: list[str], cells: list[str], line: int) -> Any:
    if problem := next((why for cell in cells if (why := not_utf8(cell, raw=True))), None):
        return Unreadable(problem)
    if any(cell.strip() for cell in cells[len(header) :]):
        return Unreadable(f"line {line} has {len(cells)} fields, the header {len(header)}; a text with commas goes into quotes")
    return dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _parquet(path: Path) -> Numbered:
    packed = _content(path) if path.suffix == ".gz" else None
    number = 0
    try:
        for batch in pq.ParquetFile(path if packed is None else pa.BufferReader(packed)).iter_batches():
            for row in _values(batch):
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # also of names and dates that Python cannot hold
        raise DataError(f"{path}: not a readable parquet file ({' '.join(str(error).split())}); write it again") from error


def _values(batch: pa.RecordBatch) -> list[Any]:
    """A batch's rows; one by one where a text in it is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [Unreadable(f"not UTF-8: {error}; write it as UTF-8")]
        return [row for i in range(batch.num_rows) for row in _values(batch.slice(i, 1))]
