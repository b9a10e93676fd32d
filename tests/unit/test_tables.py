from __future__ import annotations

import errno
import os
import pickle

import pyarrow as pa
import pytest

from ctrlray import schema
from ctrlray.errors import ConfigError, DataError, StorageError
from ctrlray.ledger import StageResult
from ctrlray.tables import Storage, from_rows, slices

ROW = {"response_id": "a", "score_x": 1.5}


def test_parts_are_read_in_order_and_replace_themselves(tmp_path):
    out = Storage(str(tmp_path / "run"))
    shape = schema.scores(["x"])
    out.write_table(from_rows([ROW], shape), "scores", "part-1")
    out.write_table(from_rows([ROW | {"response_id": "0"}], shape), "scores", "part-0")
    out.write_table(from_rows([ROW], shape), "scores", "part-1")
    assert out.read_table("scores", shape)["response_id"].to_pylist() == ["0", "a"]
    assert out.read_table("absent", shape).num_rows == 0
    assert not list(tmp_path.rglob("*.tmp"))


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


def test_an_object_store_behaves_like_a_folder(bucket):
    run = Storage(bucket.format("tables"))
    out = run.sub("score", "key")
    shape = schema.scores(["x"])
    assert not out.exists() and out.names("scores") == [] and run.folders() == []
    out.write_table(from_rows([ROW], shape), "scores", "part-1")
    out.write_table(from_rows([ROW | {"response_id": "0"}], shape), "scores", "part-0")
    assert out.read_table("scores", shape)["response_id"].to_pylist() == ["0", "a"]
    out.write_json({"a": 1}, "result.json")
    assert out.read_json("result.json") == {"a": 1} and run.folders("score") == ["key"]
    assert pickle.loads(pickle.dumps(out)).exists("result.json") and not out.is_local
    assert run.size() > 500
    run.delete("score", "key")
    assert run.folders("score") == [] and run.size() == 0
