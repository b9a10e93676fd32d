"""Toy worlds: the worlds themselves, and that each objective learns one by the real path (see benchmarks/toy_model.py)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import toys
from benchmarks.common import RESULTS
from benchmarks.toy_model import ToyBench
from benchmarks.toy_page import LEAST_PAIRWISE, LEAST_SPEARMAN, mean_interval, page, pairs
from benchmarks.toy_world import CLASSES, END, LENGTH, ToyWorld, favourite_share, perfect_error, rewards, text_of
from ctrlray import config
from ctrlray.distill import Levels

PROMPT = [{"role": "user", "content": "w3 w0 w6"}]


@pytest.fixture(scope="module")
def bench():
    """An independent pair. One thread: others of this size only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ToyBench(ToyWorld(seed=0), toys.INDEPENDENT)
    torch.set_num_threads(before)


def values_of(judged, key):
    return [attribute[key]["value"] for attribute in judged["attributes"].values()]


@pytest.mark.parametrize("entanglement", [0.0, 0.3, 0.6, 0.9])
def test_entanglement_is_the_pools_correlation(entanglement):
    world = ToyWorld(seed=3, entanglement=entanglement)
    counts_N2 = world.pool_counts(40_000, np.random.default_rng(0))
    assert np.corrcoef(counts_N2.T)[0, 1] == pytest.approx(entanglement, abs=0.02)  # positive: both rise together
    assert np.bincount(counts_N2[:, 1]) == pytest.approx(4000, rel=0.1)  # blue stays uniform, so its levels stay even
    assert len(np.unique(counts_N2, axis=0)) == 100  # every combination occurs: control is possible
    pool = world.pool()
    scores_N2 = np.column_stack([pool["score_red"], pool["score_blue"]])
    assert np.corrcoef(scores_N2.T)[0, 1] == pytest.approx(entanglement, abs=0.06)


def test_rewards_by_hand():
    red, blue, grey = (words[0] for words in CLASSES.values())
    assert rewards([[red, red, blue, grey, END], [grey, END], [END]]).tolist() == [[0.5, 0.25], [0, 0], [0, 0]]
    answer = ToyWorld(seed=0).answer(PROMPT, (4, 9), np.random.default_rng(1))
    assert len(answer) == LENGTH + 1 and rewards([answer]).tolist() == [[4 / 18, 9 / 18]]


def test_a_prompt_favours_one_word_of_each_class():
    world, rng = ToyWorld(seed=0), np.random.default_rng(0)
    answers = [world.answer(PROMPT, counts, rng) for counts in world.pool_counts(500, rng)]
    assert np.mean([favourite_share(PROMPT, a) for a in answers]) == pytest.approx(0.7, abs=0.02)
    assert text_of(answers[0]).split().count("red3") and favourite_share(PROMPT, [15, 16, 22, END]) == 1  # w3, w0 mod 4, w6 mod 4


def test_prompts_end_with_the_code():
    world = ToyWorld(seed=0)
    assert world.render(PROMPT) == [2, 7, 4, 10, 3]
    assert world.render(PROMPT, (2, 5)) == [2, 7, 4, 10, 3, 24 + 1, 24 + 5 + 4]  # red's five codes stand before blue's
    train, held_out = ([m[0]["content"] for m in prompts] for prompts in world.prompts())
    assert len({*train, *held_out}) == world.num_prompts + world.num_eval


def test_perfect_control_in_closed_form():
    # five levels of two counts each: counts 0 and 1 have F = 0.05 and 0.15, units 0.75 and 1.25
    assert perfect_error(5) == pytest.approx(0.25)
    assert perfect_error(10) == pytest.approx(0)
    assert Levels.fit(np.arange(10), 5).units([0, 1]) == pytest.approx([0.75, 1.25])


@pytest.mark.parametrize("entanglement", [0.0, 0.9])
def test_perfect_control_is_judged_perfect(entanglement):
    world = ToyBench(ToyWorld(seed=1, entanglement=entanglement))
    found = world.judged(world.perfect_grid(samples=2))
    assert values_of(found, "pairwise") == [1, 1] and values_of(found, "spearman_level_means") == pytest.approx([1, 1])
    assert values_of(found, "mae") == pytest.approx([perfect_error(5)] * 2, abs=0.03)
    slopes = [[entry["value"] for entry in row] for row in found["slopes"]]
    assert np.allclose(slopes, np.eye(2), atol=0.05)


def test_balancing_reaches_every_cell_of_an_entangled_world():
    distilled = ToyBench(ToyWorld(seed=1, entanglement=0.6)).distilled
    assert len(distilled.cells_after) == 25
    assert max(distilled.cells_after.values()) < 2 * min(distilled.cells_after.values())
    before = distilled.cells_before
    assert before["3,3"] > 3 * before["1,5"]  # what there was to balance


def test_intervals_by_hand():
    # mean 2, s = 1, t(0.975; 2) = 4.3027: 2 ± 4.3027 / sqrt(3)
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4)


def test_the_page_says_what_the_results_say():
    stored = json.loads((RESULTS / "toys.json").read_text())
    assert toys.PAGE.read_text().startswith(page(stored))
    assert stored["figures"] == toys.figures(stored)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [config.CLM(), config.ExMATE(weight=0.3)], ids=["clm", "exmate"])  # w of docs/toys.md
def test_an_objective_learns_an_independent_pair(bench, objective):
    network = bench.trained(objective, toys.INDEPENDENT_EPOCHS)
    found = bench.judged(bench.grid(network, objective.type, samples=2))
    assert min(values_of(found, "spearman_level_means")) >= LEAST_SPEARMAN
    assert min(values_of(found, "pairwise")) >= LEAST_PAIRWISE
    assert found["finished"] > 0.98 and found["mean_tokens"] == pytest.approx(LENGTH + 1, abs=0.5)


@pytest.mark.slow
def test_shuffled_codes_teach_nothing(bench):
    """The same training on codes dealt out at random: what the test above would see of a dial that does nothing."""
    found = bench.judged(bench.grid(bench.trained(config.CLM(), 4, shuffled=True), "shuffled", samples=2))
    assert values_of(found, "pairwise") == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_exmate_against_clm_over_seeds():
    """The whole benchmark. It has no favourite: only the independent pair has bounds, the rest must be measurable."""
    results = toys.run()
    measured = toys.figures(results)
    assert [f["name"] for f in measured if f["met"] is False] == []
    assert len(pairs(results["runs"], part="balanced", entanglement=0.6, epochs=results["epochs"])) == 5
    assert all(math.isfinite(bound) for f in measured for bound in (f["measured"], *f["spread"]))
    assert "## ExMATE against CLM at entanglement 0.6" in page(json.loads(json.dumps(results)))
