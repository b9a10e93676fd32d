"""Processes killed with kill -9 in the midst of their work: an engine, and under `make soak` further victims and fifty trials.

The engines are simulated, everything else is real; see `benchmarks/chaos`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

from benchmarks.chaos.plan import plan
from benchmarks.chaos.trial import Lab

pytestmark = pytest.mark.timeout(1500)
SHORT = {"engine": 4, "reward actor": 16, "driver while training": 2}
"""One that answers, one that scores a finished table, one that trains by likelihood: all on one Ray node."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # drivers, in sessions of their own, end too
    yield Lab(tmp_path_factory.mktemp("chaos"))
    signal.signal(signal.SIGTERM, before)


def whole(found: dict[str, object]) -> None:
    assert found["recovered"], found
    assert (found["lost"], found["twice"], found["unequal"], found["unaccounted"]) == (0, 0, [], []), found
    assert found["work"]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k == "engine" else pytest.mark.soak) for k in SHORT])
def test_nothing_is_lost_doubled_or_changed(lab: Lab, kind: str) -> None:
    trial = plan(SHORT[kind])
    assert trial.kind == kind and not trial.clustered
    found = lab.outcome(trial.number, timed=False)
    whole(found)
    assert found["recovered"] == ("rerun" if trial.victim == "driver" else "itself")


@pytest.mark.soak
@pytest.mark.parametrize("number", range(50))
def test_fifty_kills(lab: Lab, number: int) -> None:
    whole(lab.outcome(number, timed=False))
