"""How failures reach the terminal: one readable error, its exit code, and what to do next."""

from __future__ import annotations

import errno
import os

import pytest
from click.testing import CliRunner

from ctrlray import pipeline, runs
from ctrlray.cli import main
from ctrlray.errors import ClusterError, ConfigError, DataError, StorageError
from ctrlray.tables import written

ADVICE = "\nFailed to apply UDF transform after 1/1 attempts.\nTo change retry attempts, configure ray.data.DataContext"


class Remote(Exception):
    """Like Ray's errors: a worker's traceback as text, and what was raised there as `cause`."""

    def __init__(self, cause):
        super().__init__("ray::worker() (pid=7)\n  File x, line 1")
        self.cause = cause


def caused(error, cause):
    error.__cause__ = cause
    return error


def os_error(number, file=None, other=None):
    return OSError(number, os.strerror(number), file, None, other)


@pytest.fixture
def failing(monkeypatch, tmp_path):
    def verb(error, *more):
        def run(*_):
            raise error

        monkeypatch.setattr(pipeline, "run", run)
        return CliRunner().invoke(main, ["pipeline", "smoke", "--set", f"run_root={tmp_path}", *more])

    return verb


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("train.workers=9 is too many"), 2, "error: train.workers=9 is too many\n"),
        (Remote(DataError("row 3 has no text")), 3, "error: row 3 has no text\n"),
        (Remote(DataError("row 3 has no text" + ADVICE)), 3, "error: row 3 has no text\n"),
        (caused(RuntimeError("executor stopped"), ClusterError("no GPU")), 4, "error: no GPU\n"),
        (caused(RuntimeError("executor stopped"), Remote(DataError("row 4"))), 3, "error: row 4\n"),
    ],
)
def test_our_own_error_is_found_inside_remote_ones(failing, error, code, said):
    result = failing(error)
    assert result.exit_code == code and result.output.endswith(said) and "--debug" not in result.output


FULL = "the disk is full. Free some space and run the same command again; what was written before is kept\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (os_error(errno.ENOSPC, "/runs/x/model"), f"cannot write /runs/x/model: {FULL}"),
        (Remote(os_error(errno.EDQUOT, "/runs/x")), f"cannot write /runs/x: {FULL}"),
        (caused(RuntimeError("stopped"), Remote(os_error(errno.ENOSPC))), f"cannot write to a disk: {FULL}"),
        (Remote(os_error(errno.ENOSPC, "/base/a.json", "/runs/x/a.json")), f"cannot write /runs/x/a.json: {FULL}"),
        (Remote(RuntimeError('I/O error: No space (os error 28) at path "/r/.tmp1"')), f"cannot write /r/.tmp1: {FULL}"),
        (
            RuntimeError("Permission denied (os error 13)"),
            "cannot reach a file: permission denied. Give this user the right to it, or give another run_root\n",
        ),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), f"cannot write to a disk: {FULL}"),
        (
            Remote(os_error(errno.EROFS, "/runs/x")),
            "cannot write /runs/x: read-only file system. Make the folder writable, or give another run_root\n",
        ),
        (
            Remote(os_error(errno.EACCES, "/runs/x")),
            "cannot reach /runs/x: permission denied. Give this user the right to it, or give another run_root\n",
        ),
    ],
)
def test_a_disk_that_refuses_is_named_with_the_next_step(failing, error, said):
    result = failing(error)
    assert result.exit_code == 5 and result.output.endswith(f"error: {said}") and "--debug" not in result.output


def test_ray_s_own_error_of_a_disk(failing):
    from ray.exceptions import RayTaskError

    remote = RayTaskError("merge", "Traceback\nOSError", os_error(errno.ENOSPC, "/runs/x")).as_instanceof_cause()
    assert isinstance(remote, OSError)
    result = failing(remote)
    assert result.exit_code == 5 and result.output.endswith(f"error: cannot write /runs/x: {FULL}")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ECONNREFUSED])
def test_other_errors_of_the_system_are_not_called_the_disk_s(failing, number):
    result = failing(Remote(os_error(number, "/x")))
    assert result.exit_code == 1 and "run again with --debug" in result.output


def test_a_full_disk_is_told_by_verbs_that_read_runs_too(monkeypatch):
    def full(folder):
        raise os_error(errno.ENOSPC, "/runs/x")

    monkeypatch.setattr(runs, "find", full)
    result = CliRunner().invoke(main, ["runs", "list"])
    assert result.exit_code == 5 and result.output == f"error: cannot write /runs/x: {FULL}"


def test_what_is_written_beside_the_storage_names_its_place():
    full = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    for inside, raised in ((full, StorageError), (KeyError("x"), KeyError), (StorageError("as it was"), StorageError)):
        with pytest.raises(raised) as caught, written("/runs/x/merged"):
            raise inside
        assert str(caught.value) == (f"cannot write /runs/x/merged: {FULL.strip()}" if inside is full else str(inside))


def test_an_unknown_error_is_named_and_its_traceback_offered(failing):
    result = failing(KeyError("odd"))
    assert result.exit_code == 1 and "error: KeyError: 'odd'\nrun again with --debug" in result.output
    assert "Traceback" not in result.output
    result = failing(KeyError("odd"), "--debug")
    assert result.exit_code == 1 and "Traceback" in result.output and "run again" not in result.output


def test_ctrl_c_says_that_the_work_is_kept(failing):
    result = failing(KeyboardInterrupt())
    assert result.exit_code == 130 and "what is finished is kept, and the same command goes on from there" in result.output


def test_levels_of_the_flag_come_after_those_that_are_set():
    words = ["export", "smoke", "--dry-run", "--set", "export.levels.safety=[1, 1]", "--levels", "safety=2..2"]
    assert "safety:\n    - 2\n    - 2" in CliRunner().invoke(main, words).output
