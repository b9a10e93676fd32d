"""Parquet tables and small files under a run's storage, which is any pyarrow filesystem. Writes are atomic."""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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

_OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "obs", "tos", "hf"))
"""File systems, of pyarrow by their type and of fsspec by their protocol, that publish an object when its upload ends."""
_FILES_AT_ONCE = 256
"""Parts that one data set is made of: pyarrow keeps the metadata of each as long as it reads the others."""


@dataclass(frozen=True)
class Storage:
    """A folder at an absolute path or URI. Picklable: the filesystem is opened where it is used."""

    uri: str

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri if "://" in self.uri else Path(self.uri).as_uri())
        except ImportError as error:  # fsspec has a package for each kind of storage
            raise StorageError(f"storage {self.uri!r}: {_package(error)}, then run the same command again") from error
        except (pa.ArrowInvalid, ValueError, OSError) as error:
            why = str(error).partition("\n")[0]  # that of hdfs goes on with every place where no Java is
            raise ConfigError(f"storage {self.uri!r}: {why}. Give an absolute path or a URI such as s3://bucket/run") from error
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
        with _reached(path := self.path(*parts)):
            _forget(self.filesystem)
            return bool(self.filesystem.get_file_info(path).type != fs.FileType.NotFound)

    def names(self, *parts: str, suffix: str = "") -> list[str]:
        """Sorted names of the files in a folder; empty when there is none."""
        infos = self._listed(*parts)
        return sorted(i.base_name for i in infos if i.type == fs.FileType.File and i.base_name.endswith(suffix))

    def files(self, *parts: str) -> list[str]:
        """Sorted paths of all files below a folder, relative to it; empty when there is none."""
        top = self.path(*parts)
        infos = self._listed(*parts, recursive=True)
        return sorted(i.path.removeprefix(top).lstrip("/") for i in infos if i.type == fs.FileType.File)

    def folders(self, *parts: str) -> list[str]:
        """Sorted names of the folders in a folder; empty when there is none."""
        return sorted(i.base_name for i in self._listed(*parts) if i.type == fs.FileType.Directory)

    def size(self, *parts: str) -> int:
        """Bytes of all files below a folder."""
        return sum(i.size for i in self._listed(*parts, recursive=True) if i.type == fs.FileType.File)

    def _listed(self, *parts: str, recursive: bool = False) -> list[fs.FileInfo]:
        with _reached(path := self.path(*parts)):
            _forget(self.filesystem)
            selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
            return list(self.filesystem.get_file_info(selector))

    def remove(self, *parts: str) -> None:
        """Remove a file. Raises FileNotFoundError where there is none."""
        with _reached(path := self.path(*parts), "delete"):
            self.filesystem.delete_file(path)

    def delete(self, *parts: str) -> None:
        """Remove a folder with everything below it."""
        with _reached(path := self.path(*parts), "delete"):
            self.filesystem.delete_dir(path)

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file so that readers see all of it or none of it. Raises StorageError with the next step."""
        target = self.path(*parts)
        try:
            self._write(data, target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {_next_step(error)}") from error

    def _write(self, data: bytes, target: str) -> None:
        if not _OBJECT_STORES.isdisjoint(_kinds(self.filesystem)):
            with self.filesystem.open_output_stream(target) as sink:
                sink.write(data)
            return
        folder, name = target.rsplit("/", 1)
        self.filesystem.create_dir(folder, recursive=True)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        if not self.is_local:
            _write_and_move(self.filesystem, data, temporary, target)
            return
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def read_bytes(self, *parts: str) -> bytes:
        """A file's content. Raises FileNotFoundError where there is none."""
        with _reached(path := self.path(*parts)), self.filesystem.open_input_stream(path) as source:
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
        with _reached(self.path(name)):
            return self._dataset(name, files, schema, columns).to_table(columns=columns)

    def batches(self, name: str, schema: pa.Schema, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of `read_table` a batch at a time, for tables that do not fit into memory."""
        files = self.names(name, suffix=".parquet")
        with _reached(self.path(name)):
            for i in range(0, len(files), _FILES_AT_ONCE):
                yield from self._dataset(name, files[i : i + _FILES_AT_ONCE], schema, columns).to_batches(columns=columns)

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
        """One part of a table. Raises FileNotFoundError where there is none."""
        with _reached(path := self.path(name, f"{part}.parquet")), self.filesystem.open_input_file(path) as source:
            return pq.read_table(source, schema=schema, columns=columns)


def from_rows(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of Python rows, with its schema's metadata."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def slices(table: pa.Table, rows: int) -> list[pa.Table]:
    """Zero-copy slices of at most `rows` rows."""
    return [table.slice(i, rows) for i in range(0, table.num_rows, rows)]


def _kinds(filesystem: Any) -> tuple[str, ...]:
    """What kind a file system is; one of fsspec may go by several protocols."""
    behind = _fsspec(filesystem)
    protocol = filesystem.type_name if behind is None else behind.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _fsspec(filesystem: Any) -> Any:
    """The file system of fsspec behind one of pyarrow; None where there is none."""
    return getattr(getattr(filesystem, "handler", None), "fs", None)


def _forget(filesystem: Any) -> None:
    """Have fsspec list folders anew: it remembers what it saw there, and other processes write to them."""
    if (behind := _fsspec(filesystem)) is not None:
        behind.invalidate_cache()


def _write_and_move(disk: Any, data: bytes, temporary: str, target: str) -> None:
    """Write a file under another name, then give it its own."""
    try:
        with disk.open_output_stream(temporary) as sink:
            sink.write(data)
        try:
            disk.move(temporary, target)
        except OSError:
            if disk.get_file_info(target).type == fs.FileType.NotFound:
                raise
            _replace(disk, temporary, target)
    except BaseException:
        with suppress(Exception):  # what went wrong first is what is told
            disk.delete_file(temporary)
        raise


def _replace(disk: Any, temporary: str, target: str) -> None:
    """Move a file to where one is, for file systems such as hdfs that move nothing onto another; for a moment there is none."""
    old = f"{temporary}.old"
    disk.move(target, old)
    try:
        disk.move(temporary, target)
    except BaseException:
        disk.move(old, target)
        raise
    disk.delete_file(old)


def _package(error: ImportError) -> str:
    """What has to be installed, by what could not be imported."""
    lacks: BaseException | None = error
    while lacks is not None and not getattr(lacks, "name", None):
        lacks = lacks.__cause__
    name = str(getattr(lacks, "name", "that package")).partition(".")[0]
    return f"{str(error).rstrip('.')}. Install {name} on every node"


@contextmanager
def _reached(path: str, doing: str = "read") -> Iterator[None]:
    """Raise StorageError with the next step for what keeps `path` from being read; a missing file is the caller's."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            step = f"{_reason(error)}. Give this user the right to it, or give another run_root"
        else:
            step = f"{error}. {_CHECK}"
        raise StorageError(f"cannot {doing} {path}: {step}") from error


def disk_error(error: BaseException, place: str | None = None) -> StorageError | None:
    """What an error that was raised elsewhere says of a disk: full, not to be written to, or another user's; None for others.

    It names the file where the error does, else `place`. Libraries in Rust, safetensors among them, give the number as text.
    """
    number, file = getattr(error, "errno", None), getattr(error, "filename2", None) or getattr(error, "filename", None)
    reason = error if isinstance(error, OSError) else None
    if reason is None and (said := _RUST.search(str(error))):
        number, file = int(said[1]), said[2]
        reason = OSError(number, os.strerror(number))
    if reason is None or number not in _DISK:
        return None
    where = file or place
    if number in (errno.EACCES, errno.EPERM):
        step = "Give this user the right to it, or give another run_root"
        return StorageError(f"cannot reach {where or 'a file'}: {_reason(reason)}. {step}")
    return StorageError(f"cannot write {where or 'to a disk'}: {_next_step(reason)}")


@contextmanager
def written(place: str) -> Iterator[None]:
    """Raise StorageError with `place` and the next step when a disk refuses what is written there by other means than Storage."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if (told := disk_error(error, place)) is None:
            raise
        raise told from error


_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM))
_RUST = re.compile(r'\(os error (\d+)\)(?: at path "([^"]+)")?')
_CHECK = "Check the storage and its credentials, then run the same command again; what was written is kept"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _next_step(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full. Free some space and run the same command again; what was written before is kept"
        case errno.EROFS | errno.EACCES | errno.EPERM | errno.ENOENT | errno.ENOTDIR:
            return f"{_reason(error)}. Make the folder writable, or give another run_root"
        case _:
            return f"{error}. {_CHECK}"
