"""Locks that killed processes leave in the folder of compiled extensions."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.utils.file_baton import FileBaton

from ctrlray.train.extension import clear_locks

HOLD = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
print(baton.try_acquire(), flush=True)
input()
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    return tmp_path / "some_op" / "lock"


def test_a_lock_outlives_a_killed_process_and_is_cleared(lock):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    assert clear_locks() == [] and lock.exists()  # it is at work
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.exists() and not FileBaton(str(lock)).try_acquire()
    assert clear_locks() == [lock] and not lock.exists()


def test_a_lock_of_this_process_stays(lock):
    baton = FileBaton(str(lock))
    assert baton.try_acquire() and clear_locks() == []
    baton.release()


def test_nothing_to_clear(lock):
    assert clear_locks() == []


def test_several_clear_at_once(lock):
    lock.touch()
    with ThreadPoolExecutor(3) as pool:  # the lock is of an open file, not of a process
        found = list(pool.map(lambda _: clear_locks(), range(3)))
    assert sorted(map(len, found)) == [0, 0, 1]
