"""`ctrlray chat` on a run: a server starts for this conversation alone, and nothing of it is left when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from tests.e2e.served import ROOT, make_run

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]  # a start and nothing else; the rest of `ctrlray chat` is in unit tests
MARK = "CTRLRAY_TEST_CONVERSATION"


def marked(value):
    """Processes that inherited a mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue  # it ended just now, or is not ours to look at
    return found


def test_a_run_is_served_for_one_conversation(tiny, tmp_path, private_cache):
    run = make_run(tiny, tmp_path / "run")
    value = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", MARK: value}
    command = [sys.executable, "-m", "ctrlray", "chat", run.job.root, "--level", "variety=1", "--max-tokens", "8"]
    done = subprocess.run(command, input="/brevity 2\nHello\nAgain\n", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("brevity 2, variety 1\n") and done.stdout.endswith("\n") and "starting" in done.stderr
    end = time.monotonic() + 60
    while left := marked(value):
        assert time.monotonic() < end, left
        time.sleep(1)
