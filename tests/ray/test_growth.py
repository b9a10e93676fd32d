"""Waiting for a cluster to grow has an end that says what is missing; on real Ray nodes, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each starts clusters of its own
ROOT = Path(__file__).parent.parent.parent


def growing(*args):
    command = [sys.executable, "-m", "tests.ray.growing", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.soak
def test_a_job_waits_for_the_node_it_needs(tiny):
    said = growing(str(tiny), "grows", "60")
    assert "note: waiting for the cluster to grow: train needs 2 CPUs, the cluster has 1" in said
    assert said.endswith("fits\n")


def test_the_wait_ends_and_names_what_is_missing(tiny):
    said = growing(str(tiny), "stays", "3")
    assert "ClusterError: train needs 2 CPUs, the cluster has 1: 1 too few" in said
    assert "train.workers=1" in said and "Waited 3 s for the cluster to grow" in said
