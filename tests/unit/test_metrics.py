"""Metrics: numbers worked by hand, properties that hold for any grid, and what a dead or a perfect dial must give."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ctrlray import config, schema
from ctrlray import metrics as m
from ctrlray.errors import DataError

CONTROL = config.Control(attributes=(config.Attribute(name="kind", levels=3), config.Attribute(name="brief", levels=3)))
ONE = config.Control(attributes=(config.Attribute(name="kind", levels=3),))
CELLS = list(itertools.product((1, 2, 3), repeat=2))


def everyone(num_prompts: int) -> m.Floats:
    return np.ones((1, num_prompts))


def arrays(*columns):
    return [np.asarray(c, float) for c in columns]


def grid(rows, control=CONTROL) -> pa.Table:
    """Rows of (method, prompt, requested levels, units, tokens, text)."""
    names = [a.name for a in control.attributes]
    dicts = []
    for i, (method, prompt, requested, units, tokens, text) in enumerate(rows):
        dicts.append(
            {
                "grid_id": f"g{i}",
                "prompt_id": prompt,
                "method": method,
                "sample": 0,
                "text": text,
                "num_tokens": tokens,
                "finish_reason": "stop",
                "weights_version": 0,
                **{f"requested_{n}": r for n, r in zip(names, requested, strict=True)},
                **{f"score_{n}": u for n, u in zip(names, units, strict=True)},
                **{f"units_{n}": u for n, u in zip(names, units, strict=True)},
            }
        )
    return pa.Table.from_pylist(dicts, schema=schema.grid(names))


def dial(method, units_of, num_prompts=12, seed=0):
    """A grid of every cell on every prompt; `units_of(levels, prompt noise, row noise)` gives the achieved units."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(num_prompts):
        per_prompt = rng.normal(size=2)
        for cell in CELLS:
            units = [float(np.float32(u)) for u in units_of(np.array(cell), per_prompt, rng.normal(size=2))]
            rows.append((method, f"p{p:02d}", cell, units, int(rng.integers(5, 60)), f"{p} {units}"))
    return rows


def evaluate(rows, control=CONTROL, num_bootstrap=200, seed=0):
    return m.evaluate_grid(grid(rows, control), control, num_bootstrap, seed)


# ---------------------------------------------------------------- by hand


def test_mae_and_bias_by_hand():
    requested, units = arrays([1, 2, 3, 1], [1.5, 1.0, 3.0, 3.0])
    prompt = np.array([0, 0, 0, 1])
    # errors +0.5 -1.0 0.0 | +2.0: MAE = 3.5 / 4, bias = 1.5 / 4
    assert m.mae(requested, units, prompt, everyone(2)).tolist() == [0.875]
    assert m.bias(requested, units, prompt, everyone(2)).tolist() == [0.375]
    # a draw that holds the second prompt twice and the first once: MAE (1.5 + 4) / 5; one without the first: 2
    weights = np.array([[1.0, 2.0], [0.0, 2.0]])
    assert m.mae(requested, units, prompt, weights).tolist() == [1.1, 2.0]


def test_spearman_over_level_means_by_hand():
    requested, units = arrays([1, 2, 3, 1, 2, 3], [1.0, 3.0, 2.0, 2.0, 3.0, 2.5])
    prompt = np.array([0, 0, 0, 1, 1, 1])
    levels, means = m.level_means(requested, units, prompt, everyone(2))
    assert levels == [1, 2, 3] and means.tolist() == [[1.5, 3.0, 2.25]]
    # ranks 1 3 2 against 1 2 3: 1 - 6 (0 + 1 + 1) / (3 * 8) = 0.5
    assert m.spearman_level_means(requested, units, prompt, everyone(2)) == pytest.approx([0.5])


def test_spearman_over_level_means_without_a_level():
    requested, units = arrays([1, 2, 3, 3], [1.0, 2.0, 0.0, 5.0])
    prompt = np.array([0, 0, 0, 1])
    weights = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    # all: means 1, 2, 2.5 -> 1; only prompt 1: one level -> 0; only prompt 0: means 1, 2, 0 -> ranks 2 3 1 -> -0.5
    assert m.spearman_level_means(requested, units, prompt, weights) == pytest.approx([1.0, 0.0, -0.5])
    half = np.array([0, 0, 1, 1])  # a draw of prompt 0 alone holds levels 1 and 2 only, which rise
    assert m.spearman_level_means(requested, units, half, np.array([[1.0, 0.0]])) == pytest.approx([1.0])


def test_spearman_rows_by_hand():
    requested, units = arrays([1, 2, 3], [5.0, 5.0, 7.0])
    # ranks 1 2 3 and 1.5 1.5 3: deviations (-1 0 1), (-.5 -.5 1): 1.5 / sqrt(2 * 1.5) = 0.8660
    value = m.spearman_rows(requested, units, np.zeros(3, int), everyone(1))
    assert value == pytest.approx([math.sqrt(3) / 2])


def test_pairwise_by_hand():
    requested = np.array([[1, 1], [2, 1], [3, 1], [1, 2], [3, 2], [1, 1], [2, 2]], float)
    units = np.array([1.0, 1.0, 0.5, 0.0, 4.0, 0.0, 9.0])
    prompt = np.array([0, 0, 0, 0, 0, 1, 1])
    # first attribute, prompt 0: with the other at 1, (2 over 1) ties: 1/2, (3 over 1) no: 0, (3 over 2) no: 0;
    # with the other at 2: (3 over 1) yes: 1. Prompt 1 has no pair that differs in one attribute alone. (1/2 + 1) / 4
    assert m.pairwise_order(requested, units, 0, prompt, everyone(2)).tolist() == [0.375]
    # second attribute, prompt 0: (1,2) over (1,1): 0 > 1 no; (3,2) over (3,1): yes
    assert m.pairwise_order(requested, units, 1, prompt, everyone(2)).tolist() == [0.5]
    assert np.isnan(m.pairwise_order(requested[:1], units[:1], 0, prompt[:1], everyone(1))).all()


def test_pairwise_takes_all_samples():
    requested, units = np.array([[1.0], [1.0], [2.0], [2.0]]), np.array([0.0, 3.0, 1.0, 2.0])
    # 1 > 0, 1 < 3, 2 > 0, 2 < 3
    assert m.pairwise_order(requested, units, 0, np.zeros(4, int), everyone(1)).tolist() == [0.5]


def test_slopes_by_hand():
    requested = np.array([[a, b] for a in (1, 2, 3) for b in (1, 2, 3)] * 2, float)
    prompt = np.repeat([0, 1], 9)
    # kind = 5 + 0.5 a - 0.25 b, brief = 2 b, and each prompt has its own level of both
    units = np.column_stack([5 + 0.5 * requested[:, 0] - 0.25 * requested[:, 1], 2 * requested[:, 1]])
    units += np.array([[10.0, -3.0]]) * prompt[:, None]
    # row = requested attribute, column = achieved attribute
    assert m.slopes(requested, units, prompt, everyone(2))[0] == pytest.approx(np.array([[0.5, 0.0], [-0.25, 2.0]]))


def test_slopes_hold_the_other_setting_fixed():
    # settings 1,1 2,1 2,2 3,2 rise together; units follow the first alone, so the second must get 0
    requested = np.array([[1, 1], [2, 1], [2, 2], [3, 2]], float)
    found = m.slopes(requested, requested[:, :1] * [1, 0], np.zeros(4, int), everyone(1))[0]
    assert found == pytest.approx(np.array([[1.0, 0.0], [0.0, 0.0]]))


def test_a_setting_that_never_varies_has_slope_zero():
    requested = np.array([[1, 2], [2, 2], [3, 2]], float)
    found = m.slopes(requested, requested.copy(), np.zeros(3, int), everyone(1))[0]
    assert found == pytest.approx(np.array([[1.0, 0.0], [0.0, 0.0]]))


def test_length_adjusted_by_hand():
    tokens = np.expm1([1.0, 2.0, 3.0, 2.0, 3.0, 4.0])  # l = 1 2 3 | 2 3 4
    prompt = np.array([0, 0, 0, 1, 1, 1])
    units = np.array([[1.0], [2.0], [6.0], [9.0], [8.0], [10.0]])
    # centred l is (-1 0 1) in both prompts; units rise by 5 and by 1: b = (5 + 1) / (2 + 2) = 1.5; mean l = 2.5
    want = units[:, 0] - 1.5 * np.array([-1.5, -0.5, 0.5, -0.5, 0.5, 1.5])
    assert m.length_adjusted(units, tokens, prompt)[:, 0] == pytest.approx(want)


def test_length_that_never_varies_takes_nothing_away():
    units = np.array([[1.0], [2.0], [6.0]])
    assert m.length_adjusted(units, np.full(3, 7.0), np.array([0, 0, 1])).tolist() == units.tolist()


def test_scores_that_follow_length_alone_are_no_dial_once_adjusted():
    prompt, requested = np.repeat(np.arange(30), 3), np.array([[1.0], [2.0], [3.0]] * 30)
    tokens = 5 + 7 * requested[:, 0] + prompt  # longer at every higher setting
    units = 0.7 * np.log1p(tokens)[:, None] + 0.1 * prompt[:, None]
    adjusted = m.length_adjusted(units, tokens, prompt)
    assert m.pairwise_order(requested, units[:, 0], 0, prompt, everyone(30)) == [1.0]
    assert m.pairwise_order(requested, adjusted[:, 0], 0, prompt, everyone(30)) == [0.5]  # ties, not rounding noise


def test_pool_slopes_by_hand():
    units = np.array([[1.0, 5.0], [3.0, 4.0], [11.0, 1.0], [13.0, 2.0]])
    # centred: (-1, .5) (1, -.5) (-1, -.5) (1, .5): var 4 and 1, cov -.5 -.5 +.5 +.5 = 0
    flat = m.pool_slopes(units, ["a", "a", "b", "b"], 100)
    assert [[e["value"] for e in row] for row in flat] == [[1, 0], [0, 1]]
    tilted = m.pool_slopes(units[:2], ["a", "a"], 100)
    # cov -1, variances 2 and 0.5: brief on kind -1/2, kind on brief -2
    assert [[e["value"] for e in row] for row in tilted] == [[1, -0.5], [-2, 1]]


def test_equal_values_are_centred_to_exact_zeros():
    units = np.column_stack([[0.1] * 3 + [0.7] * 6, np.arange(9.0)])
    prompt = np.repeat([0, 1], [3, 6])
    assert (m.centre(units, prompt, 2)[:, 0] == 0).all()  # 0.1 + 0.1 + 0.1 is not 0.3
    found = m.pool_slopes(units, [f"p{p}" for p in prompt], 100)
    assert [[e["value"] for e in row] for row in found] == [[0, 0], [0, 1]]


def test_level_means_that_differ_by_rounding_are_equal():
    requested, units = arrays([1, 2, 3], [2.0, 2.0 + 1e-13, 2.0 + 2e-13])
    assert m.spearman_level_means(requested, units, np.zeros(3, int), everyone(1)) == [0.0]


def test_code_gap_by_hand():
    gap = m.code_gap([1.0, 1.0, 2.0], [1.5, 1.0, 3.0], ["a", "a", "b"], 500, 0)
    # gaps 0.5 0 | 1: mean 0.5; draws hold prompts aa (0.25), ab (0.5) or bb (1)
    assert gap == m.Interval(0.5, 0.25, 1.0)
    with pytest.raises(DataError, match="diverged"):
        m.code_gap([math.nan], [1.0], ["a"])


def test_prompts_are_resampled_not_rows():
    noise = np.random.default_rng(0).normal(size=20)
    once = m.code_gap(np.zeros(20), noise, [f"p{i}" for i in range(20)], 2000, 0)
    copied = m.code_gap(np.zeros(200), np.repeat(noise, 10), [f"p{i // 10}" for i in range(200)], 2000, 0)
    # ten copies of each example carry no more information when they share their prompt
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.1)
    # the normal approximation of the mean of 20
    assert once.high - once.low == pytest.approx(2 * 1.96 * noise.std() / math.sqrt(20), rel=0.1)


def test_correlation_within_by_hand():
    # group means hide it: within a and within b, y falls as x rises
    found = m.correlation_within([1, 2, 11, 12], [2, 1, 12, 11], ["a", "a", "b", "b"], 100)
    assert found == m.Interval(-1.0, -1.0, -1.0)
    assert m.correlation_within([1, 2], [5, 5], ["a", "a"], 100) == m.Interval(0.0, 0.0, 0.0)


def test_draws_are_the_data_and_then_resamples():
    weights = m.draws(5, 50, 3)
    assert weights.shape == (51, 5) and (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 5).all() and weights[1:].std() > 0
    assert (weights == m.draws(5, 50, 3)).all() and (weights != m.draws(5, 50, 4)).any()


# ---------------------------------------------------------------- against plain loops


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_weights_equal_repeated_rows(data):
    num = data.draw(st.integers(4, 25))
    prompt = np.array([0, 1, 2, *data.draw(st.lists(st.integers(0, 2), min_size=num - 3, max_size=num - 3))])
    level, small = st.integers(1, 3), st.integers(-3, 3)
    requested = np.array(data.draw(st.lists(st.tuples(level, level), min_size=num, max_size=num)), float)
    units = np.array(data.draw(st.lists(st.tuples(small, small), min_size=num, max_size=num)), float)
    weights = np.array([data.draw(st.tuples(*[st.integers(0, 3)] * 3).filter(any))], float)
    # the same draw written out: prompt p as weights[p] prompts of their own
    copies = [(p, k) for p in range(3) for k in range(int(weights[0, p]))]
    rows = [np.flatnonzero(prompt == p) for p, _ in copies]
    index, clone = np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    written_out = everyone(len(copies))
    for f in (m.mae, m.bias, m.spearman_level_means, m.spearman_rows):
        got = f(requested[:, 0], units[:, 0], prompt, weights)
        assert got == pytest.approx(f(requested[index, 0], units[index, 0], clone, written_out), abs=1e-9)
    got = m.pairwise_order(requested, units[:, 0], 0, prompt, weights)
    want = m.pairwise_order(requested[index], units[index, 0], 0, clone, written_out)
    assert got == pytest.approx(want, abs=1e-9, nan_ok=True)
    got = m.slopes(requested, units, prompt, weights)
    assert got == pytest.approx(m.slopes(requested[index], units[index], clone, written_out), abs=1e-6)
    x, y = requested[index, 0], units[index, 0]
    constant = len(set(x)) < 2 or len(set(y)) < 2
    expected = 0.0 if constant else stats.spearmanr(x, y).statistic
    assert m.spearman_rows(requested[:, 0], units[:, 0], prompt, weights)[0] == pytest.approx(expected, abs=1e-9)


def test_spearman_in_chunks_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    requested, units, prompt = rng.integers(1, 4, 40).astype(float), rng.normal(size=40), np.arange(40) % 8
    whole = m.spearman_rows(requested, units, prompt, m.draws(8, 50, 0))
    monkeypatch.setattr(m, "CHUNK_CELLS", 300)
    assert m.spearman_rows(requested, units, prompt, m.draws(8, 50, 0)) == pytest.approx(whole, abs=1e-12)


# ---------------------------------------------------------------- whole grids


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
    assert evaluate(clm + start) == evaluate(clm) | evaluate(start)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([lambda u: 3 * u + 1, lambda u: u**3, lambda u: np.exp(u / 4), lambda u: np.arctan(u)]),
)
def test_order_statistics_ignore_monotone_transformations(seed, transform):
    rng = np.random.default_rng(seed)
    requested, prompt = np.array(CELLS * 3, float), np.repeat(np.arange(3), 9)
    units, weights = rng.normal(size=27), m.draws(3, 5, 0)
    for f in (
        lambda u: m.spearman_rows(requested[:, 0], u, prompt, weights),
        lambda u: m.pairwise_order(requested, u, 0, prompt, weights),
    ):
        assert f(transform(units)) == pytest.approx(f(units), abs=1e-12)
        assert f(-units) == pytest.approx(_mirrored(f, units), abs=1e-12)


def _mirrored(f, units):
    values = f(units)
    return -values if f(np.zeros_like(units))[0] == 0 else 1 - values


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
    json.dumps(alone, allow_nan=False)


def test_an_empty_or_foreign_grid_is_refused():
    with pytest.raises(DataError, match="empty"):
        m.evaluate_grid(grid([]), CONTROL, 100, 0)
    with pytest.raises(DataError, match="units_brief"):
        m.evaluate_grid(grid([("clm", "p", (1,), (1.0,), 3, "x")], ONE), CONTROL, 100, 0)


# ---------------------------------------------------------------- alarms

FULL = {f"{a},{b}": 4 for a, b in CELLS}


def names_of(alarms):
    return [(a["name"], a["severity"]) for a in alarms]


def test_no_alarm_for_a_healthy_run():
    metrics = evaluate(dial("clm", lambda c, p, r: np.clip(c + 0.3 * r, 0.8, 3.2)))
    assert m.alarms(metrics, FULL, FULL, "balance", CONTROL) == []


def test_dead_dials_collapse_and_truncation_are_told():
    stuck = dial("clm", lambda c, p, r: [0.6, 2.0])
    stuck = [(*r[:5], "always this") for r in stuck]
    metrics = evaluate(stuck + [("start", *r[1:]) for r in stuck])
    metrics["clm"]["finished"] = 0.69
    found = m.alarms(metrics, FULL, FULL, "none", CONTROL)
    assert names_of(found) == [
        ("answers collapse to the extremes", "warning"),  # of the starting model, whose settings need not matter
        ("settings do not change the output", "error"),
        ("answers collapse to the extremes", "warning"),
        ("most answers truncated", "warning"),
    ]
    assert "clm: in 100%" in found[1]["detail"] and "kind" in found[2]["detail"] and "31%" in found[3]["detail"]


def test_empty_and_unbalanced_cells_are_told():
    empty = ("empty cell", "warning")
    unbalanced = ("cells unbalanced after balance", "warning")
    assert names_of(m.alarms({}, FULL | {"1,1": 0}, FULL | {"1,1": 0}, "none", CONTROL)) == [empty]
    assert names_of(m.alarms({}, FULL | {"1,1": 0}, FULL | {"1,1": 0}, "balance", CONTROL)) == [empty, unbalanced]
    assert names_of(m.alarms({}, FULL, FULL | {"1,1": 6}, "balance", CONTROL)) == []  # 6 / 4 is the limit
    assert names_of(m.alarms({}, FULL, FULL | {"1,1": 7}, "balance", CONTROL)) == [unbalanced]
    assert names_of(m.alarms({}, FULL, FULL | {"1,1": 7}, "none", CONTROL)) == []
    # moec empties the middle on purpose
    assert names_of(m.alarms({}, FULL, FULL | {"2,2": 0}, "moec", CONTROL)) == [("empty cell", "info")]
