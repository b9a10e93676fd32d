"""One run at a time in a run root."""

import contextlib
import errno
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from ctrlray import config, lease, pipeline
from ctrlray.errors import ConfigError, StorageError
from ctrlray.lease import Lease
from ctrlray.tables import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


def eventually(condition, within_s=10.0):
    end = time.monotonic() + within_s
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return true


def test_a_second_run_is_refused_and_a_finished_one_leaves_nothing(storage):
    with Lease(storage):
        with pytest.raises(ConfigError, match=f"another run is writing to .* \\(process {os.getpid()} on .*another run_root"):
            Lease(storage).__enter__()
        assert lease.holder_of(storage)["pid"] == os.getpid()
    assert lease.holder_of(storage) is None and not storage.exists(lease.FILE)
    with Lease(storage):
        pass


def test_a_killed_run_is_taken_over_at_once(storage):
    held = "import sys, time; from ctrlray.lease import Lease; from ctrlray.tables import Storage\n"
    held += "Lease(Storage(sys.argv[1])).__enter__(); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", held, storage.uri], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {other.pid}"):
        Lease(storage).__enter__()
    other.kill()
    other.wait()
    with Lease(storage):
        assert storage.read_json(lease.FILE)["pid"] == os.getpid()


def test_a_run_on_another_machine_counts_while_it_renews(storage):
    theirs = {"id": "x", "machine": "elsewhere", "host": "elsewhere", "pid": 1, "renewed": time.time() - lease.STALE_S / 2}
    storage.write_json(theirs, lease.FILE)
    with pytest.raises(ConfigError, match="process 1 on elsewhere"):
        Lease(storage).__enter__()
    storage.write_json(theirs | {"renewed": time.time() - 2 * lease.STALE_S}, lease.FILE)
    with Lease(storage):
        pass


def test_who_lost_the_lease_stops(storage, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with Lease(storage) as mine:
        mine.check()
        first = storage.read_json(lease.FILE)
        assert eventually(lambda: storage.read_json(lease.FILE)["renewed"] != first["renewed"])

        def noticed():
            storage.write_json(first | {"id": "x", "host": "elsewhere"}, lease.FILE)  # again if a renewal was on its way
            time.sleep(0.1)
            return mine._lost is not None

        assert eventually(noticed)
        with pytest.raises(ConfigError, match="elsewhere"):
            mine.check()
    assert storage.read_json(lease.FILE)["id"] == "x"  # another's lease is left alone


def test_the_pipeline_holds_it(tmp_path):
    raw = {"name": "t", "run_root": str(tmp_path), "control": {"attributes": [{"name": "a"}]}}
    reward = {"type": "function", "target": "tests.fakes:length_reward", "attributes": ["a"]}
    job = config.parse(config.Job, raw | {"rewards": [reward]}, where="t")
    with Lease(Storage(str(tmp_path))), pytest.raises(ConfigError, match="another run is writing"):
        pipeline.run(job, ["prompts"])
    pipeline.run(job, ["prompts"])
    assert not (tmp_path / lease.FILE).exists()


def test_a_lease_that_somebody_deletes_is_written_again_and_one_that_is_gone_is_given_back(storage, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with Lease(storage) as mine:
        storage.remove(lease.FILE)
        assert eventually(lambda: storage.exists(lease.FILE))
        mine.check()
    monkeypatch.setattr(lease, "RENEW_S", 60.0)
    with Lease(storage):
        storage.remove(lease.FILE)


def test_renewal_outlives_a_full_disk(storage, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    refused, write = [], Storage.write_json

    def full_at_first(self, value, *parts):
        if len(refused) < 2:
            refused.append(parts)
            raise StorageError("the disk is full")
        write(self, value, *parts)

    with Lease(storage):
        before = storage.read_json(lease.FILE)["renewed"]
        monkeypatch.setattr(Storage, "write_json", full_at_first)
        assert eventually(lambda: len(refused) == 2 and storage.read_json(lease.FILE)["renewed"] != before)


@pytest.mark.parametrize("content", [b"", b"null", b'{"pid": 1}'])
def test_a_file_that_is_no_lease_is_named(storage, content):
    storage.write_bytes(content, lease.FILE)
    with pytest.raises(ConfigError, match=r"running\.json is not a lease of a run; delete it when no run writes to"):
        Lease(storage).__enter__()


def test_a_lease_that_is_given_back_while_it_is_read_holds_nobody_up(storage, monkeypatch):
    monkeypatch.setattr(Storage, "exists", lambda *_: True)
    assert lease.holder_of(storage) is None


def test_another_user_s_process_counts_and_three_renewals_may_be_missed(storage, monkeypatch):
    def not_ours(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", not_ours)
    theirs = {"id": "x", "machine": lease.machine(), "host": "here", "pid": 1, "renewed": 0.0}
    storage.write_json(theirs, lease.FILE)
    with pytest.raises(ConfigError, match="process 1 on here"):
        Lease(storage).__enter__()
    assert lease.STALE_S > 3 * lease.RENEW_S


def entered_together(storage, count=2):
    """Leases of as many threads as come at once: what each got, a Lease or the error."""
    found = []

    def enter():
        try:
            found.append(Lease(storage).__enter__())
        except ConfigError as error:
            found.append(error)

    threads = [threading.Thread(target=enter) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("local", [True, False])
def test_of_two_that_come_at_once_one_gets_it(storage, monkeypatch, local):
    """Both look before either has written, unless something keeps the second one waiting."""
    both, look = threading.Barrier(2), lease.require_free

    def slowly(storage):
        look(storage)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    monkeypatch.setattr(lease, "require_free", slowly)
    monkeypatch.setattr(lease, "SETTLE_S", 1.0)
    if not local:  # as an object store: no lock
        monkeypatch.setattr(Storage, "is_local", False)
    got = entered_together(storage)
    held = [g for g in got if isinstance(g, Lease)]
    assert len(held) == 1 and "another run is writing to" in str(next(g for g in got if g is not held[0]))
    assert storage.read_json(lease.FILE)["id"] == held[0]._id
    held[0].__exit__(None, None, None)
    with Lease(storage):  # whoever was refused keeps no lock
        pass


def test_a_process_that_was_given_a_dead_holder_s_number_is_not_it(storage):
    mine = {"id": "x", "machine": lease.machine(), "host": "here", "pid": os.getpid(), "renewed": 0.0}
    storage.write_json(mine | {"started": lease._started(os.getpid()) - 1}, lease.FILE)
    assert lease.holder_of(storage) is None
    with Lease(storage):
        noted = storage.read_json(lease.FILE)
        assert noted["id"] != "x" and noted["started"] == lease._started(os.getpid())
        with pytest.raises(ConfigError, match="another run is writing"):
            Lease(storage).__enter__()
    for unknown in (mine, mine | {"started": None}):  # of a machine that does not tell
        storage.write_json(unknown, lease.FILE)
        assert lease.holder_of(storage)["id"] == "x"


def test_a_process_started_after_another_has_a_later_start():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert lease._started(other.pid) > lease._started(os.getpid())
        other.stdin.close()
    assert lease._started(2**22 + 1) is None


@pytest.mark.parametrize("call", ["read_json", "remove"])
def test_storage_that_is_away_in_the_end_does_not_hide_what_the_run_ended_with(storage, monkeypatch, caplog, call):
    def away(*_):
        raise OSError(errno.EIO, "Input/output error")

    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="the run's own"), Lease(storage):
        monkeypatch.setattr(Storage, call, away)
        raise RuntimeError("the run's own")
    assert f"running.json of {storage.uri} is left behind: [Errno 5]" in caplog.text
