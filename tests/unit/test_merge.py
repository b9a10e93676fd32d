"""Merging an adapter into a model folder: by one of several at once, with an end, and nothing left of those killed."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from ctrlray import adapter
from ctrlray.errors import ClusterError, StorageError
from ctrlray.tables import Storage
from ctrlray.train import run as train


def left_by(out, pid):
    place = out.with_name(f"{out.name}.tmp-{socket.gethostname()}-{pid}")
    place.mkdir(parents=True)
    (place / "half").write_text("")
    return place


def test_what_killed_merges_left_is_deleted_and_what_live_ones_work_on_is_not(tmp_path):
    out = tmp_path / "merged"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    killed, own, live = (left_by(out, pid) for pid in (dead.pid, os.getpid(), os.getppid()))
    elsewhere = tmp_path / f"merged.tmp-{socket.gethostname()}-x-1"  # of another host, whose name goes on
    other = tmp_path / "other.tmp-1"
    for folder in (elsewhere, other):
        folder.mkdir()
    assert train._unfinished(out) == own
    assert not killed.exists() and not own.exists() and live.exists() and elsewhere.exists() and other.exists()


@pytest.mark.parametrize("first", [False, True])
def test_a_merge_that_another_process_made_first_is_a_success(tmp_path, monkeypatch, first):
    trained, out = Storage(str(tmp_path / "adapter")), tmp_path / "model" / "merged"
    trained.write_bytes(b"weights", "adapter.safetensors")

    def merge(base, scratch, made, dtype):
        assert Path(scratch, "adapter.safetensors").read_bytes() == b"weights"
        for folder, who in ((Path(made), "mine"), *([(out, "theirs")] if first else [])):
            folder.mkdir(parents=True)
            (folder / "weights").write_text(who)

    monkeypatch.setattr(adapter, "merge", merge)
    assert train._merge_task("base", trained, str(out), None) == str(out)
    assert (out / "weights").read_text() == ("theirs" if first else "mine")
    assert [f.name for f in out.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_a_disk_that_is_full_in_a_merge_is_named(tmp_path, monkeypatch, error):
    trained, out = Storage(str(tmp_path / "adapter")), tmp_path / "model" / "merged"

    def merge(*_):
        raise error

    monkeypatch.setattr(adapter, "merge", merge)
    with pytest.raises(StorageError, match=f"^cannot write {out}: the disk is full. Free some space") as caught:
        train._merge_task("base", trained, str(out), None)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it comes from a worker
    (tmp_path / "model").write_text("")
    with pytest.raises(FileExistsError):  # no disk's fault
        train.merged_folder("base", trained, str(out), 7.0)


class Late:
    """Ray, as it looks to a driver whose task never ends."""

    exceptions = ray.exceptions

    def __init__(self):
        self.cancelled = []

    def remote(self, *_):
        return self

    def options(self, **_):
        return self

    def get(self, task, timeout):
        raise ray.exceptions.GetTimeoutError(f"after {timeout}")

    def cancel(self, task, force):
        self.cancelled.append((task, force))

    def available_resources(self):
        return {"CPU": 0.5}


def test_a_merge_that_does_not_end_is_an_error_that_says_so(tmp_path, monkeypatch):
    late = Late()
    monkeypatch.setattr(train, "ray", late)
    with pytest.raises(ClusterError, match=r"for 7 s; it waits for the merge of .*/clm/adapter into .*stall_timeout_s") as caught:
        train.merged_folder("base", Storage(str(tmp_path / "clm")), str(tmp_path / "merged"), 7.0)
    assert "0.5 CPUs are free" in str(caught.value) and late.cancelled == [(late, True)]
    (tmp_path / "merged").mkdir()
    assert train.merged_folder("base", Storage(str(tmp_path)), str(tmp_path / "merged"), 7.0) == str(tmp_path / "merged")
