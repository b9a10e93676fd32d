"""Parquet tables and small files under a run's storage, which is any pyarrow filesystem. Writes are atomic."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from pyarrow import fs

from ctrlray.errors import ConfigError, DataError, StorageError
from ctrlray.schema import VERSION


@dataclass(frozen=True)
class Storage:
    """A folder at an absolute path or URI. Picklable: the filesystem is opened where it is used."""

    uri: str

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri if "://" in self.uri else Path(self.uri).as_uri())
        except (pa.ArrowInvalid, ValueError, OSError) as error:
            raise ConfigError(f"storage {self.uri!r}: {error}. Give an absolute path or a URI such as s3://bucket/run") from error
        return filesystem, path.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    @property
    def filesystem(self) -> fs.FileSystem:
        """The pyarrow filesystem that holds the folder."""
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        """Whether plain file access works."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Path of something below the folder, as the filesystem spells it."""
        return "/".join([self._opened[1], *parts])

    def sub(self, *parts: str) -> Storage:
        """A folder below this one."""
        base, mark, options = self.uri.partition("?")  # s3://bucket/run?endpoint_override=... keeps its options
        return Storage("/".join([base.rstrip("/"), *parts]) + mark + options)

    def exists(self, *parts: str) -> bool:
        """Whether a file or folder is there."""
        return bool(self.filesystem.get_file_info(self.path(*parts)).type != fs.FileType.NotFound)

    def names(self, *parts: str, suffix: str = "") -> list[str]:
        """Sorted names of the files in a folder; empty when there is none."""
        selector = fs.FileSelector(self.path(*parts), allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in infos if i.type == fs.FileType.File and i.base_name.endswith(suffix))

    def files(self, *parts: str) -> list[str]:
        """Sorted paths of all files below a folder, relative to it; empty when there is none."""
        top = self.path(*parts)
        infos = self.filesystem.get_file_info(fs.FileSelector(top, allow_not_found=True, recursive=True))
        return sorted(i.path.removeprefix(top).lstrip("/") for i in infos if i.type == fs.FileType.File)

    def folders(self, *parts: str) -> list[str]:
        """Sorted names of the folders in a folder; empty when there is none."""
        infos = self.filesystem.get_file_info(fs.FileSelector(self.path(*parts), allow_not_found=True))
        return sorted(i.base_name for i in infos if i.type == fs.FileType.Directory)

    def size(self, *parts: str) -> int:
        """Bytes of all files below a folder."""
        selector = fs.FileSelector(self.path(*parts), allow_not_found=True, recursive=True)
        return sum(i.size for i in self.filesystem.get_file_info(selector) if i.type == fs.FileType.File)

    def remove(self, *parts: str) -> None:
        """Remove a file."""
        self.filesystem.delete_file(self.path(*parts))

    def delete(self, *parts: str) -> None:
        """Remove a folder with everything below it."""
        self.filesystem.delete_dir(self.path(*parts))

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file so that readers see all of it or none of it. Raises StorageError with the next step."""
        target = self.path(*parts)
        try:
            self._write(data, target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {_next_step(error)}") from error

    def _write(self, data: bytes, target: str) -> None:
        if not self.is_local:  # object stores publish an object when its upload ends
            with self.filesystem.open_output_stream(target) as sink:
                sink.write(data)
            return
        self.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        folder, name = target.rsplit("/", 1)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def read_bytes(self, *parts: str) -> bytes:
        """A file's content."""
        with self.filesystem.open_input_stream(self.path(*parts)) as source:
            return bytes(source.read())

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON file, keys in the order given."""
        self.write_bytes((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), *parts)

    def read_json(self, *parts: str) -> Any:
        """A JSON file's value."""
        return json.loads(self.read_bytes(*parts))

    def write_table(self, table: pa.Table, name: str, part: str = "part-00000") -> None:
        """Write one part of a table; a part written again replaces itself."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", store_schema=True)
        self.write_bytes(sink.getvalue().to_pybytes(), name, f"{part}.parquet")

    def read_table(self, name: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        """All parts of a table, in part order; empty when none was written. Checks table name and schema version."""
        if not (files := self.names(name, suffix=".parquet")):
            empty = schema.empty_table()
            return empty.select(columns) if columns else empty
        return self._dataset(name, files, schema, columns).to_table(columns=columns)

    def batches(self, name: str, schema: pa.Schema, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of `read_table` a batch at a time, for tables that do not fit into memory."""
        if files := self.names(name, suffix=".parquet"):
            yield from self._dataset(name, files, schema, columns).to_batches(columns=columns)

    def _dataset(self, name: str, files: list[str], schema: pa.Schema, columns: list[str] | None) -> Any:
        first = pq.read_schema(self.path(name, files[0]), filesystem=self.filesystem)
        found = (first.metadata or {}).get(b"ctrlray.version", b"?").decode()
        if found != str(VERSION):
            raise DataError(f"{self.uri}/{name}: schema version {found}, this ctrlray reads {VERSION}; start a new run_root")
        missing = [n for n in (columns or schema.names) if n not in first.names]
        if missing:
            raise DataError(f"{self.uri}/{name}: lacks the columns {missing}; rerun the stage that writes it")
        parts = [self.path(name, f) for f in files]
        return pyarrow.dataset.dataset(parts, filesystem=self.filesystem, schema=schema, format="parquet")

    def check_unique(self, name: str, schema: pa.Schema, column: str) -> None:
        """Raise DataError, naming the parts, when a table holds a row twice."""
        ids = self.read_table(name, schema, [column])[column]
        if (extra := len(ids) - pc.count_distinct(ids).as_py()) == 0:
            return
        first = next(found["values"] for found in ids.value_counts().to_pylist() if found["counts"] > 1)
        files = self.names(name, suffix=".parquet")
        where = [f for f in files if first in self.read_part(name, f.removesuffix(".parquet"), schema)[column].to_pylist()]
        raise DataError(
            f"{self.uri}/{name}: {extra} rows are there more than once, among them {first} in {where}. A process that was taken "
            "for dead wrote late; delete all but one of those parts and run the same command again"
        )

    def read_part(self, name: str, part: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        """One part of a table."""
        with self.filesystem.open_input_file(self.path(name, f"{part}.parquet")) as source:
            return pq.read_table(source, schema=schema, columns=columns)


def from_rows(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of Python rows, with its schema's metadata."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def slices(table: pa.Table, rows: int) -> list[pa.Table]:
    """Zero-copy slices of at most `rows` rows."""
    return [table.slice(i, rows) for i in range(0, table.num_rows, rows)]


def _next_step(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full. Free some space and run the same command again; what was written before is kept"
        case errno.EROFS | errno.EACCES | errno.EPERM | errno.ENOENT | errno.ENOTDIR:
            reason = (error.strerror or str(error)).lower()
            return f"{reason}. Make the folder writable, or give another run_root"
        case _:
            return f"{error}. Check the storage and its credentials, then run the same command again; what was written is kept"
