"""Reinforcement in a toy world, by the real path (benchmarks/toy_policy.py): each estimator takes steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import toys, toys_ppo
from benchmarks.common import RESULTS
from benchmarks.toy_model import ToyBench, toy_network
from benchmarks.toy_policy import reinforced
from benchmarks.toy_ppo_page import ESTIMATORS, section
from benchmarks.toy_world import NUM_WORDS, ToyWorld

FEW = 30


@pytest.fixture(scope="module")
def bench():
    """An independent pair, without pool or codes. One thread: others of this size only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ToyBench(ToyWorld(seed=0))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def untrained(bench):
    return toy_network(bench.world, bench.recipe.hidden)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator", [e if e == "rloo" else pytest.param(e, marks=pytest.mark.soak) for e in ESTIMATORS]
)
def test_an_estimators_reward_rises_within_a_few_steps(bench, untrained, estimator):
    before = {n: p.clone() for n, p in untrained.named_parameters()}
    trained, curves = reinforced(bench, toys_ppo.objective(estimator, toys_ppo.SCRATCH_RATE, 0.0, steps=FEW), untrained)
    assert [c["step"] for c in curves] == list(range(1, FEW + 1))
    assert np.mean([c["reward"] for c in curves[-3:]]) > np.mean([c["reward"] for c in curves[:3]]) + 0.1
    assert all(torch.equal(before[n], p) for n, p in untrained.named_parameters())  # the start is left as it was
    assert any(not torch.equal(before[n], p) for n, p in trained.named_parameters())
    assert ("explained_variance" in curves[-1]) == (estimator == "gae")


@pytest.mark.slow
def test_answers_hold_no_control_token(bench, untrained):
    trained, _ = reinforced(bench, toys_ppo.objective("rloo", toys_ppo.SCRATCH_RATE, 0.0, steps=2), untrained)
    words = [int(w) for text in bench.grid(trained, "rloo", samples=1)["text"].to_pylist() for w in text.split()]
    assert max(words) < NUM_WORDS


@pytest.mark.slow
def test_a_kl_in_the_reward_holds_the_policy_near_its_start(bench, untrained):
    def drift(coefficient):
        _, curves = reinforced(bench, toys_ppo.objective("rloo", toys_ppo.SCRATCH_RATE, coefficient, steps=15), untrained)
        return curves[-1]["kl"]

    assert drift(1.0) < 0.5 * drift(0.0)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_estimators_learn_from_random_weights_and_after_clm():
    """The whole benchmark."""
    assert [f["name"] for f in toys_ppo.figures(toys_ppo.run()) if f["met"] is False] == []


def test_the_page_ends_as_the_results_say():
    stored = json.loads((RESULTS / "toys_ppo.json").read_text())
    assert toys.PAGE.read_text().endswith(section(stored))
