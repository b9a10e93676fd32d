"""Processes killed with kill -9 in the midst of their work: a few kinds of victim here, fifty trials under `make soak`.

The engines are simulated, everything else is real; see `benchmarks/chaos`.
"""

from __future__ import annotations

import pytest

from benchmarks.chaos.plan import plan
from benchmarks.chaos.trial import Lab, Missed

pytestmark = pytest.mark.timeout(900)
SHORT = {"engine": 4, "reward actor": 16, "driver while training": 2}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("chaos"))


def outcome(lab: Lab, number: int) -> dict[str, object]:
    for _ in range(2):
        try:
            return lab.run(plan(number))
        except Missed:  # the run was quicker than the watch on it
            continue
    return lab.run(plan(number))


def whole(found: dict[str, object]) -> None:
    assert found["recovered"], found
    assert (found["lost"], found["twice"], found["unequal"], found["unaccounted"]) == (0, 0, [], []), found
    assert found["work"]


@pytest.mark.soak
@pytest.mark.parametrize("kind", SHORT)
def test_nothing_is_lost_doubled_or_changed(lab: Lab, kind: str) -> None:
    trial = plan(SHORT[kind])
    assert trial.kind == kind
    found = outcome(lab, trial.number)
    whole(found)
    assert found["recovered"] == ("rerun" if trial.victim == "driver" else "itself")


@pytest.mark.soak
@pytest.mark.parametrize("number", range(50))
def test_fifty_kills(lab: Lab, number: int) -> None:
    whole(outcome(lab, number))
