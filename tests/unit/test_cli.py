"""How failures reach the terminal: one readable error, its exit code, and what to do next."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from ctrlray import pipeline
from ctrlray.cli import main
from ctrlray.errors import ClusterError, ConfigError, DataError

ADVICE = "\nFailed to apply UDF transform after 1/1 attempts.\nTo change retry attempts, configure ray.data.DataContext"


class Remote(Exception):
    """Like Ray's errors: a worker's traceback as text, and what was raised there as `cause`."""

    def __init__(self, cause):
        super().__init__("ray::worker() (pid=7)\n  File x, line 1")
        self.cause = cause


def caused(error, cause):
    error.__cause__ = cause
    return error


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
