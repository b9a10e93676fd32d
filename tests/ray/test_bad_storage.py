"""Storage that says no: a full disk, a folder that cannot be written to, two runs in one. Real file systems, not patches."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner

from ctrlray import config, schema
from ctrlray.cli import _root_cause, main
from ctrlray.errors import StorageError
from ctrlray.lease import Lease
from ctrlray.ledger import Silent
from ctrlray.stages import score
from ctrlray.tables import Storage

JOB = {
    "name": "t",
    "control": {"attributes": [{"name": "brevity", "levels": 2}]},
    "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}],
    "prompts": {"train": 20, "eval": 4},
}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def prompts_verb(tmp_path: Path, root: Path):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOB | {"run_root": str(root)}))
    return CliRunner().invoke(main, ["prompts", str(job)])


def test_a_full_disk_is_named_and_goes_on_when_there_is_room(small_disk, tmp_path):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 56 * 1024)
    result = prompts_verb(tmp_path, small_disk / "run")
    assert result.exit_code == 5 and "the disk is full. Free some space and run the same command again" in result.output
    assert not list(small_disk.rglob("*.tmp")) and not list(small_disk.rglob("result.json"))
    ballast.unlink()
    assert prompts_verb(tmp_path, small_disk / "run").exit_code == 0


@pytest.mark.slow
def test_a_full_disk_in_the_writer_of_an_actor_stops_the_stage_and_keeps_what_was_written(local_ray, small_disk):
    job = config.parse(config.Job, JOB | {"score": {"batch_size": 2}}, where="t")
    out = Storage(str(small_disk / "score"))
    ids = [schema.digest(i) for i in range(400)]
    rows = pa.table({"response_id": ids, "prompt_id": ["p"] * 400, "text": ["word"] * 400, "finish_reason": ["stop"] * 400})
    with pytest.raises(Exception) as caught:
        score.run(rows, {"p": [{"role": "user", "content": "q"}]}, job, out, Silent())
    error = _root_cause(caught.value)
    assert "the disk is full" in str(getattr(error, "cause", None) or error)
    assert "StorageError" in type(error).__name__ or isinstance(error, StorageError)
    kept = out.read_table("scores", schema.scores(["brevity"]))
    assert 0 < kept.num_rows < 400 and set(kept["response_id"].to_pylist()) <= set(ids)


@pytest.mark.parametrize("root", ["/sys/ctrlray", "/proc/ctrlray", "/dev/null/ctrlray"])
def test_a_folder_that_cannot_be_written_to(tmp_path, root):
    result = prompts_verb(tmp_path, Path(root))
    assert result.exit_code == 5, result.output
    assert f"cannot write {root}" in result.output and "give another run_root" in result.output


def test_two_runs_in_one_directory(tmp_path):
    with Lease(Storage(str(tmp_path / "run"))):
        result = prompts_verb(tmp_path, tmp_path / "run")
        assert result.exit_code == 2 and "another run is writing to" in result.output and "another run_root" in result.output
    assert prompts_verb(tmp_path, tmp_path / "run").exit_code == 0
