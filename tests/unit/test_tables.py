from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter, ValidationError

from ctrlray import schema, tables
from ctrlray.config.places import Root
from ctrlray.errors import ConfigError, DataError, StorageError
from ctrlray.ledger import StageResult
from ctrlray.tables import Storage, from_rows, slices

ROW = {"response_id": "a", "score_x": 1.5}


def caused(error, cause):
    error.__cause__ = cause
    return error


def test_parts_are_read_in_order_and_replace_themselves(tmp_path):
    out = Storage(str(tmp_path / "run"))
    shape = schema.scores(["x"])
    out.write_table(from_rows([ROW], shape), "scores", "part-1")
    out.write_table(from_rows([ROW | {"response_id": "0"}], shape), "scores", "part-0")
    out.write_table(from_rows([ROW], shape), "scores", "part-1")
    assert out.read_table("scores", shape)["response_id"].to_pylist() == ["0", "a"]
    assert out.read_table("absent", shape).num_rows == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_table_of_many_parts_is_read_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_FILES_AT_ONCE", 2)
    out, shape = Storage(str(tmp_path)), schema.scores(["x"])
    for i in range(5):
        out.write_table(from_rows([ROW | {"response_id": f"{i}"}], shape), "scores", f"part-{i}")
    assert [b["response_id"].to_pylist() for b in out.batches("scores", shape, ["response_id"])] == [[f"{i}"] for i in range(5)]
    assert list(out.batches("absent", shape)) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "disk is full.*run the same command again"),
        (errno.EDQUOT, "disk is full.*run the same command again"),
        (errno.EROFS, "read-only file system. Make the folder writable"),
        (errno.EIO, "Input/output error. Check the storage and its credentials"),
    ],
)
def test_failed_write_leaves_nothing(tmp_path, monkeypatch, number, said):
    out = Storage(str(tmp_path))

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError, match=said):
        out.write_bytes(b"x" * 10, "file")
    assert list(tmp_path.iterdir()) == []


READS = {
    "exists": lambda out: out.exists("result.json"),
    "names": lambda out: out.names("scores"),
    "files": lambda out: out.files("scores"),
    "folders": lambda out: out.folders(),
    "size": lambda out: out.size(),
    "read_bytes": lambda out: out.read_bytes("result.json"),
    "read_json": lambda out: out.read_json("result.json"),
    "read_part": lambda out: out.read_part("scores", "part-00000", schema.scores(["x"])),
    "read_table": lambda out: out.read_table("scores", schema.scores(["x"])),
    "batches": lambda out: list(out.batches("scores", schema.scores(["x"]))),
    "remove": lambda out: out.remove("result.json"),
    "delete": lambda out: out.delete("scores"),
}


class Refusing:
    """A file system that answers nothing."""

    def __init__(self, number):
        self.number = number

    def __getattr__(self, name):
        def refuse(*_, **__):
            raise OSError(self.number, os.strerror(self.number))

        return refuse


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "permission denied. Give this user the right to it, or give another run_root"),
        (errno.EIO, "Input/output error. Check the storage and its credentials, then run the same command again"),
    ],
)
@pytest.mark.parametrize("how", READS)
def test_storage_that_cannot_be_read_is_named(how, number, said):
    out = Storage("/runs/one")
    out.__dict__["_opened"] = (Refusing(number), "/runs/one")
    verb = {"remove": "delete", "delete": "delete"}.get(how, "read")
    with pytest.raises(StorageError, match=rf"^cannot {verb} /runs/one\S*: .*{said}"):
        READS[how](out)


def test_what_is_read_of_a_table_is_named_too(tmp_path):
    """The list of its parts is there, and then the storage goes."""
    out = Storage(str(tmp_path))
    out.write_table(from_rows([ROW], schema.scores(["x"])), "scores")
    (tmp_path / "scores" / "part-00000.parquet").unlink()
    (tmp_path / "scores" / "part-00000.parquet").mkdir()  # opening it is an OSError
    out.__dict__["names"] = lambda *_, **__: ["part-00000.parquet"]
    for how in ("read_table", "batches", "read_part"):
        with pytest.raises(StorageError, match=rf"^cannot read {tmp_path}/scores.*Check the storage"):
            READS[how](out)


@pytest.mark.parametrize("how", ["read_bytes", "read_part", "remove"])
def test_a_file_that_is_not_there_is_for_the_caller_to_judge(tmp_path, how):
    with pytest.raises(FileNotFoundError):
        READS[how](Storage(str(tmp_path)))


def test_a_bucket_that_is_not_there_is_named(bucket):
    nowhere = Storage(bucket.format("x").replace("s3://runs/", "s3://nowhere/").replace("allow_bucket_creation=true&", ""))
    assert not nowhere.exists("job.yaml")
    with pytest.raises(StorageError, match=r"cannot write nowhere/x/job\.yaml: .*NO_SUCH_BUCKET.*Check the storage"):
        nowhere.write_bytes(b"", "job.yaml")


def test_wrong_version_and_missing_columns_are_named(tmp_path):
    out = Storage(str(tmp_path))
    old = pa.schema(schema.scores(["x"]), metadata={"ctrlray.version": "0"})
    out.write_table(from_rows([ROW], old), "scores")
    with pytest.raises(DataError, match="schema version 0"):
        out.read_table("scores", schema.scores(["x"]))
    out.write_table(from_rows([ROW], schema.scores(["x"])), "scores")
    with pytest.raises(DataError, match="score_y"):
        out.read_table("scores", schema.scores(["y"]))


def test_storage_is_picklable_and_refuses_nonsense(tmp_path):
    out = Storage(str(tmp_path))
    assert out.exists()
    assert pickle.loads(pickle.dumps(out)) == out
    with pytest.raises(ConfigError, match="Give an absolute path or a URI"):
        Storage("nonsense://x").exists()


def test_slices_cover_the_table():
    table = pa.table({"a": range(7)})
    assert [s.num_rows for s in slices(table, 3)] == [3, 3, 1]


def test_ledger_finds_a_lost_row():
    StageResult(5, 3, {"why": 1}, {"error": 1}).check("s")
    with pytest.raises(DataError, match="1 are unaccounted for"):
        StageResult(5, 3, {"why": 1}).check("s")
    with pytest.raises(DataError, match="-1 are unaccounted for"):  # one counted twice
        StageResult(5, 5, {"why": 1}).check("s")


def test_ids_by_hand():
    # sha256 of ["p","b",0,"f"] in compact JSON, first 16 hex digits
    import hashlib

    assert schema.response_id("p", "b", 0, "f") == hashlib.sha256(b'["p","b",0,"f"]').hexdigest()[:16]
    one = [{"role": "user", "content": "a"}]
    assert schema.prompt_id(one) == schema.prompt_id([dict(reversed(one[0].items()))])
    assert schema.prompt_id(one) != schema.prompt_id([{"role": "system", "content": "a"}])


class Remembering(LocalFileSystem):
    """A file system of fsspec that lists a folder once, as those of clouds do, and moves nothing onto another, as hdfs does."""

    protocol = "remembering"
    seen: ClassVar[dict[str, Any]] = {}

    def find(self, path, **more):
        if path not in self.seen:
            self.seen[path] = super().find(path, **more)
        return self.seen[path]

    def invalidate_cache(self, path=None):
        self.seen.clear()

    def mv(self, path1, path2, **more):
        if self.exists(path2):
            raise FileExistsError(path2)
        super().mv(path1, path2, **more)


fsspec.register_implementation("remembering", Remembering)
KINDS = ["plain", "fsspec+file", "fsspec+remembering", "fsspec+memory", "s3"]


@pytest.fixture(params=KINDS)
def anywhere(request, tmp_path):
    """A run's storage on each kind of file system."""
    match request.param:
        case "plain":
            return Storage(str(tmp_path / "run"))
        case "s3":
            return Storage(request.getfixturevalue("bucket").format(f"tables-{tmp_path.name}"))
        case kind:
            return Storage(f"{kind}://{tmp_path}/run")


def test_any_file_system_behaves_like_a_folder(anywhere):
    run = anywhere
    out = run.sub("score", "key")
    shape = schema.scores(["x"])
    assert not out.exists() and out.names("scores") == [] and run.folders() == []
    out.write_table(from_rows([ROW], shape), "scores", "part-1")
    out.write_table(from_rows([ROW | {"response_id": "0"}], shape), "scores", "part-0")
    assert out.names("scores") == ["part-0.parquet", "part-1.parquet"]
    assert out.read_table("scores", shape)["response_id"].to_pylist() == ["0", "a"]
    assert [b.num_rows for b in out.batches("scores", shape)] == [1, 1]
    assert out.read_part("scores", "part-1", shape)["response_id"].to_pylist() == ["a"]
    for value in ({"a": 0, "b": 0}, {"a": 1}):  # the second over the first
        out.write_json(value, "result.json")
    assert out.read_json("result.json") == {"a": 1} and run.folders("score") == ["key"]
    assert run.files() == [f"score/key/{n}" for n in ("result.json", "scores/part-0.parquet", "scores/part-1.parquet")]
    assert pickle.loads(pickle.dumps(out)).exists("result.json") and run.size() > 500
    out.remove("result.json")
    assert not out.exists("result.json")
    with pytest.raises(FileNotFoundError):
        out.read_bytes("result.json")
    run.delete("score", "key")
    assert run.folders("score") == [] and run.size() == 0


@pytest.mark.parametrize("there", [b"", b"old"], ids=["first", "again"])
@pytest.mark.parametrize("kind", ["fsspec+file", "fsspec+remembering"])
def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch, kind, there):
    """The process is told that the disk is full: while it writes, then while it gives the file its name."""
    out = Storage(f"{kind}://{tmp_path}/run")
    out.write_bytes(there, "file") if there else None
    names = out.names()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:1])
            raise full

    def move(self, path1, path2, **more):
        if ".old" in path1 + path2:
            return shutil.move(path1, path2)
        raise full

    for method, fails in (("open", lambda self, path, mode="rb", **_: Full(path, mode)), ("mv", move)):
        with monkeypatch.context() as patched:
            patched.setattr(LocalFileSystem, method, fails)
            patched.setattr(Remembering, method, fails)
            with pytest.raises(StorageError, match=r"cannot write .*file: the disk is full\. Free some space"):
                out.write_bytes(b"new one", "file")
        assert out.names() == names and (not there or out.read_bytes("file") == there)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (caused(ImportError("Please install gcsfs"), ModuleNotFoundError("no", name="gcsfs.core")), "Install gcsfs on"),
        (ImportError("X requires paramiko."), "X requires paramiko. Install that package on"),
    ],
)
def test_a_file_system_without_its_package_is_named(monkeypatch, error, said):
    def from_uri(uri):
        raise error

    monkeypatch.setattr(tables.fs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    with pytest.raises(StorageError) as caught:
        Storage("fsspec+gcs://b/run").exists()
    assert str(caught.value).startswith("storage 'fsspec+gcs://b/run': ")
    assert f"{said} every node, then run the same command again" in str(caught.value)


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="needs a Python without gcsfs")
def test_a_real_file_system_without_its_package():
    with pytest.raises(StorageError, match=r"Please install gcsfs to access Google Storage\. Install gcsfs on every node"):
        Storage("fsspec+gcs://b/run").exists()


@pytest.mark.parametrize("uri", ["fsspec+sftp://me:secret@host/run", "s3://key:secret@bucket/run", "x://a?y=http://me:secret@h/"])
def test_a_password_in_a_root_is_refused(uri):
    with pytest.raises(ValidationError, match="run_root holds credentials"):
        TypeAdapter(Root).validate_python(uri)
    assert TypeAdapter(Root).validate_python("fsspec+sftp://host/a@b") == "fsspec+sftp://host/a@b"
