"""Whole grids: what a dead, a noisy or a perfect dial must give."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest

from ctrlray.errors import DataError
from ctrlray.metrics.grid import evaluate_grid
from tests.grids import CELLS, CONTROL, ONE, dial, evaluate, grid


def test_a_perfect_dial():
    found = evaluate(dial("exmate", lambda cell, prompt, row: cell))["exmate"]
    one, zero = {"value": 1.0, "low": 1.0, "high": 1.0}, {"value": 0.0, "low": 0.0, "high": 0.0}
    for a in ("kind", "brief"):
        measured = found["attributes"][a]
        assert measured["mae"] == measured["bias"] == zero
        assert measured["pairwise"] == measured["spearman_level_means"] == one
        assert measured["spearman_rows"]["value"] == 1.0
        assert found["level_means"][a] == {str(k): {"value": float(k), "low": float(k), "high": float(k)} for k in (1, 2, 3)}
    assert found["slopes"] == [[one, zero], [zero, one]]
    assert found["distinct_outputs"] == 1.0
    for a in ("kind", "brief"):
        assert found["attributes"][a]["kendall_level_means"] == found["attributes"][a]["monotone_prompts"] == one
    assert found["entanglement"] == {"off_diagonal": zero, "index": zero}
    # the corner (3, 3) has shares (3 - 0.5) / 3 = 5/6 in both, and dominates the others
    assert found["pareto"]["hypervolume"]["value"] == pytest.approx(25 / 36)
    assert found["pareto"]["sparsity"] == {"value": None, "low": None, "high": None}  # a front of one point
    # every answer keeps to its setting; the mean share of the other attribute is 1/2
    assert found["cosa"]["kind"]["value"] == pytest.approx(0.5)
    assert [c["levels"] for c in found["cells"]] == [list(c) for c in CELLS]
    assert all(c["count"] == 12 and c["units"]["brief"]["value"] == c["levels"][1] for c in found["cells"])


@pytest.mark.parametrize("seed", range(5))
def test_a_method_that_ignores_the_dial_is_exactly_at_chance(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(13):
        units, tokens = rng.uniform(0.5, 3.5, size=2).astype(np.float32).tolist(), int(rng.integers(5, 60))
        rows += [("start", f"p{p}", cell, units, tokens, f"answer {p}") for cell in CELLS]
    found = evaluate(rows)["start"]
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    for measured in found["attributes"].values():
        for values in (measured, measured["length_adjusted"]):
            assert values["pairwise"] == {"value": 0.5, "low": 0.5, "high": 0.5}
            assert values["spearman_level_means"] == values["spearman_rows"] == zero
    assert found["slopes"] == found["slopes_length_adjusted"] == [[zero, zero], [zero, zero]]
    assert found["distinct_outputs"] == 0.0
    assert found["entanglement"]["off_diagonal"] == zero and found["entanglement"]["index"]["value"] is None
    assert all(v["kendall_level_means"] == v["monotone_prompts"] == zero for v in found["attributes"].values())
    # it does not move: nothing of what was asked for is done, and nothing goes sideways
    assert found["steerability"]["miscalibration"]["value"] == pytest.approx(1.0)
    assert found["steerability"]["orthogonality"] == zero
    assert found["texts"]["distinct_1"]["value"] <= 2 / 9  # nine times the same two words


def test_a_noisy_entangled_dial():
    def units(cell, prompt, row):
        return 0.6 * cell + 0.3 * cell[::-1] + prompt + 0.5 * row

    found = evaluate(dial("clm", units, num_prompts=60))["clm"]
    for i, j in itertools.product(range(2), repeat=2):
        slope, truth = found["slopes"][i][j], 0.6 if i == j else 0.3
        # standard error: 0.5 / sqrt(60 prompts * 9 cells * 2/3) = 0.026
        assert slope["low"] < truth < slope["high"] and abs(slope["value"] - truth) < 0.08
        assert 0.05 < slope["high"] - slope["low"] < 0.16
    pairwise = found["attributes"]["kind"]["pairwise"]
    # differences of 0.6 k + noise of deviation 0.5 sqrt 2: (2 Phi(0.849) + Phi(1.697)) / 3 = (2 * 0.802 + 0.955) / 3
    assert pairwise["value"] == pytest.approx(0.853, abs=0.03)
    assert pairwise["low"] < pairwise["value"] < pairwise["high"]


def test_row_order_changes_nothing():
    rows = dial("clm", lambda c, p, r: c + p + r) + dial("start", lambda c, p, r: p)
    mixed = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    assert json.dumps(evaluate(rows)) == json.dumps(evaluate(mixed))
    assert list(evaluate(mixed)) == ["start", "clm"]


def test_methods_do_not_mix():
    clm, start = dial("clm", lambda c, p, r: c + p + r), dial("start", lambda c, p, r: p)
    together, apart = evaluate(clm + start), evaluate(clm) | evaluate(start)
    # but for the one statistic that looks from where the starting model stands
    assert together["clm"].pop("steerability") != apart["clm"].pop("steerability")
    assert together == apart


def test_rows_without_a_score_are_left_out_and_counted():
    rows = dial("clm", lambda c, p, r: c + r, num_prompts=4)
    broken = [*rows, ("clm", "p00", (3, 3), (math.nan, 1.0), 5, "odd"), ("clm", "q", (1, 1), (1.0, None), 5, "x")]
    whole, found = evaluate(rows)["clm"], evaluate(broken)["clm"]
    assert (found["num_rows"], found["num_excluded"], found["num_prompts"]) == (36, 2, 4)
    assert found["attributes"] == whole["attributes"] and found["slopes"] == whole["slopes"]
    with pytest.raises(DataError, match="none of 1 rows"):
        evaluate([("clm", "q", (1, 1), (1.0, None), 5, "x")])


def test_one_attribute_one_prompt_and_one_level():
    rows = [("clm", "p", (k,), (k + 0.25,), 10 + k, f"{k}") for k in (1, 2, 3)]
    found = evaluate(rows, ONE)["clm"]
    assert found["attributes"]["kind"]["bias"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert found["slopes"] == [[{"value": 1.0, "low": 1.0, "high": 1.0}]]
    alone = evaluate(rows[:1], ONE)["clm"]
    assert alone["attributes"]["kind"]["pairwise"] == {"value": None, "low": None, "high": None}
    assert alone["slopes"][0][0]["value"] == 0.0
    assert alone["attributes"]["kind"]["spearman_level_means"]["value"] == 0.0
    assert alone["steerability"]["error"] == {"value": None, "low": None, "high": None}  # no starting model in the grid
    assert alone["cosa"] == {} and alone["entanglement"]["off_diagonal"]["value"] is None
    json.dumps(alone, allow_nan=False)


def test_steerability_starts_from_the_starting_model():
    # the starting model reaches (2, 2) whatever is asked; asked for (3, 2), the dial reaches (3, 3)
    rows = [
        ("start", "p", (3, 2), (2.0, 2.0), 5, "a"),
        ("clm", "p", (3, 2), (3.0, 3.0), 5, "b"),
        ("clm", "q", (1, 1), (1.0, 1.0), 5, "c"),
    ]
    found = evaluate(rows)["clm"]["steerability"]
    # d = (1, 0), missed by (0, 1): error 1, nothing of it along d, and of the movement (1, 1) a part of length 1 across
    assert found["error"]["value"] == 1.0 and found["miscalibration"]["value"] == 0.0
    assert found["orthogonality"]["value"] == pytest.approx(1 / math.sqrt(2))


def test_an_empty_or_foreign_grid_is_refused():
    with pytest.raises(DataError, match="empty"):
        evaluate_grid(grid([]), CONTROL, 100, 0)
    with pytest.raises(DataError, match="units_brief"):
        evaluate_grid(grid([("clm", "p", (1,), (1.0,), 3, "x")], ONE), CONTROL, 100, 0)


LONG = "We may walk. We may walk. We may walk."
HAND = [  # one attribute of three levels, two prompts: units, tokens, text
    ("p0", 1, 1.0, 3, "No."),
    ("p0", 2, 2.0, 7, "I'm sorry, but I can't help with that."),
    ("p0", 3, 3.0, 15, LONG),
    ("p1", 1, 2.0, 7, "Yes."),
    ("p1", 2, 3.0, 15, LONG),
    ("p1", 3, 1.0, 3, "Yes."),
]


def test_every_statistic_of_a_grid_is_the_one_that_it_is_called():
    """By hand. Units are log2(1 + tokens) - 1, so that length explains all of them: tokens 3, 7, 15 give 1, 2, 3."""
    found = evaluate([("clm", p, (k,), (u,), n, text) for p, k, u, n, text in HAND], ONE)["clm"]
    kind = found["attributes"]["kind"]
    # p0 has all three pairs in order, p1 that of levels 1 and 2
    assert kind["pairwise"]["value"] == pytest.approx(4 / 6)
    assert kind["length_adjusted"]["pairwise"]["value"] == 0.5 and kind["length_adjusted"]["monotone_prompts"]["value"] == 0
    assert found["slopes"][0][0]["value"] == pytest.approx((2 - 1) / 4)
    assert found["slopes_length_adjusted"][0][0]["value"] == 0
    assert kind["monotone_prompts"]["value"] == 0.5
    assert kind["mae"]["value"] == pytest.approx((0 + 0 + 0 + 1 + 1 + 2) / 6) and kind["bias"]["value"] == 0
    assert found["mean_tokens"] == pytest.approx(50 / 6) and found["finished"] == 1
    assert found["texts"]["tokens"]["value"] == pytest.approx(50 / 6)
    # levels 1, 2, 3 ask for shares 1/6, 3/6, 5/6 of one attribute, whose weight is then 1: the mean of the reached shares
    reached = [(units - 0.5) / 3 for units in (1.5, 2.5, 2.0)]
    assert found["pareto"]["mean_inner_product"]["value"] == pytest.approx(np.mean(reached))
    # words of p0: no / i'm sorry but i can't help with that / we may walk, three times; of p1: yes / the long one / yes
    assert found["texts"]["distinct_1"]["value"] == pytest.approx((1 + 8 + 3 + 1 + 3) / (1 + 8 + 9 + 1 + 9 + 1))
    assert found["texts"]["distinct_2"]["value"] == pytest.approx((7 + 3 + 3) / (7 + 8 + 8))
    # of the long answer's six 4-grams three differ; "no" and "yes" have none, the refusal repeats nothing
    assert found["texts"]["repetition"]["value"] == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert found["texts"]["refused"]["value"] == pytest.approx(1 / 6)


def test_answers_of_several_models_never_mix():
    """Two training seeds of one method, the second of which scores ten levels higher: each is compared with itself alone."""
    weak = dial("clm", lambda c, p, r: 0.3 * c + p + r, num_prompts=15)
    strong = dial("clm", lambda c, p, r: 10 + 2.0 * c + p + r, num_prompts=15, seed=1)
    pooled = evaluate_grid(
        grid(weak + strong).append_column("model", pa.array([0] * len(weak) + [1] * len(strong))), CONTROL, 200, 0
    )["clm"]
    alone = [evaluate(rows)["clm"] for rows in (weak, strong)]
    assert pooled["num_prompts"] == 15 and pooled["num_rows"] == 2 * 15 * 9
    for name in ("kind", "brief"):
        for key in ("pairwise", "monotone_prompts", "bias"):
            values = [a["attributes"][name][key]["value"] for a in alone]
            assert pooled["attributes"][name][key]["value"] == pytest.approx(np.mean(values)), key
            assert values[0] != values[1]
    assert pooled["slopes"][0][0]["value"] == pytest.approx(np.mean([a["slopes"][0][0]["value"] for a in alone]))


def test_a_prompt_is_drawn_with_the_answers_of_all_models():
    """Copies of a model add no certainty: the interval over prompts stays as wide as with one."""
    rows = dial("clm", lambda c, p, r: 0.5 * c + p + r, num_prompts=15)
    copies = grid(rows * 4).append_column("model", pa.array([k for k in range(4) for _ in rows]))
    pooled, one = evaluate_grid(copies, CONTROL, 300, 0)["clm"], evaluate_grid(grid(rows), CONTROL, 300, 0)["clm"]
    for key in ("pairwise", "mae", "spearman_level_means"):
        assert pooled["attributes"]["kind"][key] == pytest.approx(one["attributes"]["kind"][key])
