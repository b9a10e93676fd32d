"""A driver that is killed is started again, one that ends by itself or is told to is not; with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from ctrlray import restarts
from ctrlray.cli import main

ROOT = Path(__file__).parent.parent.parent
COUNTS = "import os, signal, sys, pathlib; p = pathlib.Path(sys.argv[1]); n = int(p.read_text() or 0) + 1; p.write_text(str(n));"


def kept(tmp_path, code, most):
    counter = tmp_path / "count"
    counter.write_text("")
    found = restarts.keep([sys.executable, "-c", COUNTS + code, str(counter)], most, pause_s=0)
    return found, int(counter.read_text())


@pytest.mark.parametrize(
    ("code", "most", "expected"),
    [
        ("sys.exit(0)", 3, (0, 1)),
        ("sys.exit(4)", 3, (4, 1)),
        ("os.kill(os.getpid(), signal.SIGKILL)", 2, (137, 3)),
        ("os.kill(os.getpid(), signal.SIGKILL) if n < 3 else sys.exit(0)", 5, (0, 3)),
        ("os.kill(os.getpid(), signal.SIGTERM)", 3, (143, 1)),
    ],
)
def test_only_a_killed_driver_comes_back(tmp_path, code, most, expected):
    assert kept(tmp_path, code, most) == expected


def test_a_wish_to_end_is_passed_on_and_ends_the_restarts(tmp_path):
    """The driver answers SIGTERM by being killed; its keeper was told to end, so it stays down."""
    ready = tmp_path / "ready"
    code = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
        "p = pathlib.Path(sys.argv[1]); p.write_text(str(int(p.read_text() if p.exists() else 0) + 1))\n"
        "time.sleep(60)"
    )
    words = f"[sys.executable, '-c', {code!r}, {str(ready)!r}]"
    command = f"from ctrlray.restarts import keep; import sys; sys.exit(keep({words}, 3))"
    keeper = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT)
    try:
        while not ready.exists() or not ready.read_text():
            assert keeper.poll() is None
            time.sleep(0.05)
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(timeout=30) == 137 and ready.read_text() == "1"
    finally:
        if keeper.poll() is None:
            keeper.kill()


def test_the_pipeline_runs_itself_again_with_the_same_words(monkeypatch):
    seen = []
    monkeypatch.setattr(restarts, "keep", lambda command, most: seen.append((command, most)) or 7)
    result = CliRunner().invoke(main, ["pipeline", "smoke", "--restarts", "2", "--set", "seed=1", "--set", "name=x", "--debug"])
    assert result.exit_code == 7
    words = ["pipeline", "smoke", "--set", "seed=1", "--set", "name=x", "--debug"]
    assert seen == [([sys.executable, "-m", "ctrlray", *words], 2)]
    assert os.path.exists(sys.executable)
