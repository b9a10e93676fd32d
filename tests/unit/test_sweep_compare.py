"""Figures of a sweep: paired differences by hand, what is not compared, and the page, csv and terminal table made of them."""

from __future__ import annotations

import csv
import html
import io
import json
import re

import numpy as np
import pytest

from ctrlray import schema
from ctrlray.metrics.rows import rows_of
from ctrlray.pipeline import STAGES
from ctrlray.sweep import page
from ctrlray.sweep.compare import STATISTICS, Rows, among, compare, difference
from ctrlray.sweep.plan import load
from ctrlray.sweep.run import Outcome
from ctrlray.tables import from_rows
from tests.unit.test_sweep_plan import ABLATION, write

EVIL = "<script>alert(1)</script>"


def grid_rows(units, levels=3, prompts=("p", "q"), method="exmate"):
    """One answer per prompt and setting; `units[prompt][level - 1]`."""
    rows = []
    for i, p in enumerate(prompts):
        for level in range(1, levels + 1):
            rows.append(
                {
                    "grid_id": f"{method}{p}{level}",
                    "prompt_id": p,
                    "method": method,
                    "sample": 0,
                    "text": "t",
                    "num_tokens": 4,
                    "finish_reason": "stop",
                    "weights_version": 1,
                    "requested_brevity": level,
                    "score_brevity": 0.0,
                    "units_brevity": units[i][level - 1],
                }
            )
    return rows


def finish(run, rows, method="exmate"):
    """The files of a finished run whose grid has these rows."""
    for stage in STAGES:
        run.out(stage).write_json({"rows_out": 5, "seconds": 60.0, "facts": {}}, "result.json")
    out = run.out("evaluate")
    out.write_table(from_rows(rows, schema.grid(["brevity"])), "grid")
    measured = {"mean_tokens": 4.0, "distinct_outputs": 1.0, "slopes": [[{"value": 1.0, "low": 1.0, "high": 1.0}]]}
    out.write_json({method: measured, "start": measured}, "metrics.json")
    gaps = {"example_id": "e", "prompt_id": "p", "method": method, "nll_right": 1.0, "nll_wrong": 1.5}
    run.out("train").sub(method).write_table(from_rows([gaps], schema.code_gaps()), "code_gaps")


@pytest.fixture
def plan(tmp_path):
    return load(write(tmp_path, variants=ABLATION[:4]))


@pytest.fixture
def found(plan):
    finish(plan.runs["base"], grid_rows([[1, 2, 3], [2, 2, 2]]) + grid_rows([[9, 9, 9]] * 2, method="start"))
    finish(plan.runs["weight"], grid_rows([[1, 2, 3], [1, 2, 3]]))
    finish(plan.runs["levels"], grid_rows([[1, 2, 3, 4, 5]] * 2, levels=5))
    finish(plan.runs["response"], grid_rows([[1, 2, 3]], prompts=("other",)))
    outcomes = {n: Outcome("", 1.0) for n in plan.jobs} | {"text": Outcome(f"it died {EVIL}\nlook", 2.0)}
    return compare(plan, outcomes)


def of(found, variant):
    return next(v for v in found["variants"] if v["variant"] == variant)


def test_values_are_those_of_the_exported_method(found):
    base = of(found, "base")["attributes"]["brevity"]
    # prompt p: 3 pairs right; prompt q: 3 ties that count half each
    assert base["pairwise"]["value"] == pytest.approx((3 + 1.5) / 6)
    assert base["ends"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert base["mae"]["value"] == pytest.approx(2 / 6)  # |2-1| + |2-3| of six answers
    assert base["slope"]["value"] == pytest.approx(0.5)  # 1 and 0
    assert base["spearman_level_means"]["value"] == pytest.approx(1.0)
    assert "difference" not in base["pairwise"]
    assert of(found, "base")["code_gap"]["value"] == pytest.approx(0.5) and of(found, "base")["seconds"] == 240.0


def test_a_difference_is_of_the_same_prompts_in_the_same_draws(found):
    weight = of(found, "weight")["attributes"]["brevity"]
    assert weight["shared_prompts"] == 2
    assert weight["pairwise"]["difference"]["value"] == pytest.approx(1 - 4.5 / 6)
    assert weight["mae"]["difference"]["value"] == pytest.approx(-2 / 6)
    # draws hold p twice, both or q twice: the difference is 0, 1/4 or 1/2
    assert {k: weight["pairwise"]["difference"][k] for k in ("value", "low", "high")} == {"value": 0.25, "low": 0.0, "high": 0.5}


def test_p_values_are_corrected_over_variants_and_attributes(found):
    ps = {v: of(found, v)["attributes"]["brevity"]["ends"]["difference"] for v in ("weight", "levels")}
    # exchanging the one prompt that differs turns the difference round, which is as extreme: p = 1; Holm leaves it at 1
    assert {(d["p"], d["p_holm"]) for d in ps.values()} == {(1.0, 1.0)}
    assert "p" not in of(found, "weight")["attributes"]["brevity"]["slope"]["difference"]


def test_a_difference_that_is_sure_stays_so_among_others(tmp_path):
    plan = load(write(tmp_path, variants=ABLATION[:3]))
    prompts = [f"p{i}" for i in range(20)]
    flat, right = [[2, 2, 2]] * 20, [[1, 2, 3]] * 20
    for name, units in (("base", flat), ("weight", right), ("response", flat), ("levels", [[2] * 5] * 20)):
        finish(plan.runs[name], grid_rows(units, len(units[0]), prompts))
    found = compare(plan, {n: Outcome("", 1.0) for n in plan.jobs})
    sure, none = (of(found, v)["attributes"]["brevity"]["pairwise"]["difference"] for v in ("weight", "response"))
    assert sure["p"] == pytest.approx(1e-4, rel=0.2)
    assert sure["p_holm"] == pytest.approx(2 * sure["p"])  # of two: five levels are not compared
    assert (none["p"], none["p_holm"]) == (1.0, 1.0)
    assert of(found, "weight")["attributes"]["brevity"]["ends"]["difference"]["p_holm"] == pytest.approx(3 * sure["p"])
    (table,) = [page.statistics_table(found, "brevity")]
    tones = {row[0].text: row[3].tone for row in table.rows}
    assert tones == {"base": "muted", "weight": "good", "response": "", "levels": "muted"}


def test_what_a_number_of_levels_decides_is_not_compared_across_it(found):
    levels = of(found, "levels")["attributes"]["brevity"]
    compared = {key for key in STATISTICS if levels[key]["difference"] is not None}
    assert compared == {"ends", "slope"} and levels["ends"]["difference"]["value"] == pytest.approx(0.25)
    assert levels["levels"] == 5


def test_without_a_shared_prompt_nothing_is_compared(found):
    response = of(found, "response")["attributes"]["brevity"]
    assert response["shared_prompts"] == 0 and {response[key]["difference"] for key in STATISTICS} == {None}
    assert response["pairwise"]["value"] == 1.0


def test_a_base_that_failed_leaves_values_without_differences(plan):
    finish(plan.runs["weight"], grid_rows([[1, 2, 3], [1, 2, 3]]))
    outcomes = {n: Outcome("" if n == "weight" else "died", 1.0) for n in plan.jobs}
    found = compare(plan, outcomes)
    assert of(found, "weight")["attributes"]["brevity"]["pairwise"]["value"] == 1.0
    assert "difference" not in of(found, "weight")["attributes"]["brevity"]["pairwise"]
    assert page.csv_text(found) and page.render(found) and page.lines(found)


def test_a_common_shift_of_hard_prompts_does_not_widen_a_difference():
    """Two variants that differ by a constant on prompts of very different errors: pairing leaves nothing to spread."""
    rng = np.random.default_rng(0)
    hard_P = rng.uniform(0, 3, 30)
    prompt_N = np.repeat(np.arange(30), 3)
    requested_NA = np.tile([[1.0], [2.0], [3.0]], (30, 1))
    rows = [Rows(requested_NA, requested_NA + hard_P[prompt_N][:, None] + shift, prompt_N, 30) for shift in (0.5, 0.0)]
    made = difference(STATISTICS["mae"], rows, (0, 0), 200, 0)
    assert made["value"] == pytest.approx(0.5) and made["high"] - made["low"] < 1e-6 and made["p"] < 0.001


def test_the_ends_ask_the_same_of_any_number_of_levels():
    requested = np.array([[1.0], [2.0], [3.0]])
    units = np.array([[1.0], [3.0], [2.0]])  # the ends are in order, the middle is not
    rows = Rows(requested, units, np.zeros(3, np.int64), 1)
    ends, pairwise = (STATISTICS[key].of(rows, 0, np.ones((1, 1)))[0] for key in ("ends", "pairwise"))
    assert ends == 1.0 and pairwise == pytest.approx(2 / 3)


def test_rows_of_other_prompts_are_left_out_and_the_rest_counted_as_given(tmp_path):
    grid = from_rows(grid_rows([[1, 2, 3], [4, 5, 6], [7, 8, 9]], prompts=("p", "q", "r")), schema.grid(["brevity"]))
    rows = rows_of(grid, load(write(tmp_path)).jobs["base"].control)["exmate"]
    kept = among(rows, ["r", "p"])
    assert kept.num_prompts == 2 and kept.prompt_N.tolist() == [1, 1, 1, 0, 0, 0]
    assert kept.units_NA[:, 0].tolist() == [1, 2, 3, 7, 8, 9]


def test_the_csv_has_a_line_per_statistic_and_one_per_failure(found):
    rows = list(csv.DictReader(io.StringIO(page.csv_text(found))))
    assert len(rows) == 4 * len(STATISTICS) + 1
    weight = next(r for r in rows if (r["variant"], r["statistic"]) == ("weight", "pairwise"))
    assert (float(weight["value"]), float(weight["difference"]), weight["error"]) == (1.0, 0.25, "")
    assert next(r for r in rows if r["state"] == "failed")["error"] == f"it died {EVIL}\nlook"
    levels = next(r for r in rows if (r["variant"], r["statistic"]) == ("levels", "mae"))
    assert levels["difference"] == ""


def test_the_terminal_s_table_has_a_line_per_variant(found):
    made = page.lines(found)
    assert [line.split()[0] for line in made] == ["variant", "base", "weight", "response", "levels", "text"]
    assert "0.750 [0.500, 1.000]" in made[1] and "0.250 [0.000, 0.500]" in made[2]
    assert made[5].startswith("text                     failed: it died ")


def test_the_page_is_self_contained_and_escapes_what_variants_say(found):
    made = page.render(found)
    assert EVIL not in made and "&lt;script&gt;alert(1)" in made
    own = made[: made.index("<script>")]
    assert not re.search(r"""(src|href)=["']?https?:""", own)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', made)
    assert policy is not None and html.unescape(policy[1]).startswith("default-src 'none'; ")
    figures = [json.loads(s) for s in re.findall(r'<script type="application/json" class="spec">(.*?)</script>', made, re.S)]
    assert len(figures) == 2
    assert [t["y"] for t in figures[0]["data"]] == [["base"], ["weight"], ["response"], ["levels"]]
    assert figures[0]["data"][1]["x"] == [1.0] and figures[0]["layout"]["shapes"][0]["x0"] == 0.5


def test_better_is_green_whichever_way_a_statistic_points():
    above, below = ({"value": s * 0.2, "low": s * 0.2 - 0.1, "high": s * 0.2 + 0.1} for s in (1, -1))
    tones = [page._difference_cell(v | {"p_holm": 0.01}, key).tone for key in ("ends", "mae") for v in (above, below)]
    assert tones == ["good", "bad", "bad", "good"]
    assert page._difference_cell(above | {"p_holm": 0.06}, "ends").tone == ""
    assert page._difference_cell(above, "slope").tone == "good"
    assert page._difference_cell({"value": 0.0, "low": -0.1, "high": 0.1}, "ends").tone == ""
