"""One run at a time in a run root."""

import os
import subprocess
import sys
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
        assert eventually(lambda: storage.read_json(lease.FILE)["renewed"] > first["renewed"])

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
        assert eventually(lambda: len(refused) == 2 and storage.read_json(lease.FILE)["renewed"] > before)


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
