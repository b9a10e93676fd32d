"""Figures and tables of the evaluated dial, by hand; what a figure draws is also what it saves."""

import pytest

from ctrlray.stages import report_dial as dial
from ctrlray.stages import report_trades as trades
from ctrlray.stages import report_training as training
from ctrlray.stages.report_figures import cell_figures
from tests.evaluated import NAMES
from tests.reports import DASH, LOOK, MINUS, ci, texts, traces


def cell(levels, kind, brief, count=4):
    return {"levels": list(levels), "count": count, "units": {"kind": ci(kind), "brief": ci(brief)}}


# (1,2) is beaten by (2,2) in both; the others are on the front
CELLS = [cell((1, 1), 2.5, 1.0), cell((1, 2), 1.5, 1.5), cell((2, 2), 2.0, 2.0)]


def test_pareto_front_and_its_staircase():
    metrics = {"exmate": {"cells": CELLS, "pareto": {"hypervolume": ci(0.4)}}}
    (figure,) = dial.pareto_figures(NAMES, metrics, LOOK)
    assert list(map(list, figure.rows)) == [
        ["method", "levels requested", "achieved kind", "achieved brief", "on the front"],
        ["exmate", "1,1", 2.5, 1.0, "yes"],
        ["exmate", "1,2", 1.5, 1.5, "no"],
        ["exmate", "2,2", 2.0, 2.0, "yes"],
    ]
    stairs, marks = traces(figure)
    # from the left edge at height 2 to kind 2, down to 1, right to kind 2.5, down to the reference point
    assert list(zip(stairs["x"], stairs["y"], strict=True)) == [(0.5, 2), (2, 2), (2, 1), (2.5, 1), (2.5, 0.5)]
    assert marks["text"] == ["1,1", "", "2,2"] and "(hypervolume 0.40)" in figure.alt


def test_pareto_takes_pairs_and_leaves_out_what_has_no_value():
    nothing = {"levels": [2, 1], "count": 0, "units": {"kind": {"value": None, "low": None, "high": None}, "brief": ci(1)}}
    (figure,) = dial.pareto_figures(NAMES, {"exmate": {"cells": [*CELLS, nothing]}, "clm": {}}, LOOK)
    assert len(figure.rows) == 1 + 3 and len(traces(figure)) == 2
    assert dial.pareto_figures(NAMES[:1], {"exmate": {"cells": CELLS}}, LOOK) == []
    assert dial.pareto_figures(NAMES, {"exmate": {}}, LOOK) == []


def test_dial_heat_maps_show_every_cell_with_its_count():
    kind, brief = dial.heat_figures(NAMES, (2, 2), {"exmate": {"cells": CELLS}})
    (heat,) = traces(kind)
    assert (heat["y"], heat["x"]) == (["1", "2"], ["1", "2"])  # rows are kind, columns brief; (2,1) was not evaluated
    assert heat["z"] == [[2.5, 1.5], [None, 2.0]] and heat["text"] == [["2.50<br>n 4", "1.50<br>n 4"], ["none", "2.00<br>n 4"]]
    assert (heat["zmin"], heat["zmax"]) == (0.5, 2.5)
    assert traces(brief)[0]["z"] == [[1.0, 1.5], [None, 2.0]]
    assert kind.rows[0] == ["requested kind", "requested brief", "achieved kind", "low", "high", "answers"]
    assert kind.rows[2] == [1, 2, 1.5, 1.4, 1.6, 4] and len(kind.rows) == 4
    assert dial.heat_figures(NAMES[:1], (2,), {"exmate": {"cells": CELLS}}) == []


def test_response_plot_moves_methods_apart_but_saves_the_levels():
    means = {"kind": {"2": ci(1.8), "1": ci(1.2)}}
    (figure,) = dial.response_figures(["kind"], [2], {m: {"level_means": means} for m in ("clm", "exmate")}, LOOK)
    ideal, clm, exmate = traces(figure)
    assert ideal["x"] == ideal["y"] == [1, 2]
    assert clm["x"] == pytest.approx([0.97, 1.97]) and exmate["x"] == pytest.approx([1.03, 2.03])
    assert exmate["y"] == [1.2, 1.8] and exmate["error_y"]["array"] == pytest.approx([0.1, 0.1])
    assert figure.rows[1:3] == [["clm", 1, 1.2, 1.1, 1.3], ["clm", 2, 1.8, 1.7, 1.9]]


def test_slopes_as_figure_and_numbers():
    slopes = [[ci(0.8), ci(-0.3)], [ci(0.0), ci(0.6)]]
    figure = dial.slope_figure("exmate", NAMES, slopes)
    (heat,) = traces(figure)
    assert heat["z"] == [[0.8, -0.3], [0.0, 0.6]] and (heat["zmin"], heat["zmax"]) == (-1, 1)
    assert heat["text"][0][1] == f"{MINUS}0.30<br>[{MINUS}0.40, {MINUS}0.20]"
    assert figure.rows[2] == ["kind", "brief", -0.3, -0.4, -0.2]
    numbers = texts(trades.slope_table("exmate", NAMES, slopes))
    assert numbers == [["requested kind", "0.80", f"{MINUS}0.30"], ["requested brief", "0.00", "0.60"]]


def test_entanglement_stands_beside_the_pools():
    pool = [[1.0, -0.5], [0.3, 1.0]]  # sideways (0.5 + 0.3) / 2 = 0.4, index 0.4 / 1
    index = {"value": 0.2, "low": 0.1, "high": 0.3}
    metrics = {"exmate": {"entanglement": {"off_diagonal": ci(0.1), "index": index}, "steerability": {"error": ci(1.2)}}}
    found = trades.entanglement_table(metrics, pool)
    data, method = found.rows
    assert [c.text for c in data] == ["data pool", "0.40", "0.40", *[DASH] * 5]
    # 0.2 / 0.4 and its ends, all below 1
    assert method[3].text == "0.50" and method[3].note == "[0.25, 0.75]" and method[3].tone == "good"
    assert [c.text for c in method][:3] == ["exmate", "0.10", "0.20"] and method[5].text == "1.20"
    worse = {"exmate": {"entanglement": {"off_diagonal": ci(1), "index": {"value": 1.2, "low": 0.8, "high": 1.6}}}}
    assert trades.entanglement_table(worse, pool).rows[1][3].tone == "bad"
    assert [row[0].text for row in trades.entanglement_table(metrics, None).rows] == ["exmate"]
    assert trades.entanglement_table({"exmate": {}}, pool) is None


def test_trade_offs():
    pareto = {"hypervolume": ci(0.4), "mean_inner_product": ci(0.55), "sparsity": {"value": 0.0123, "low": None, "high": None}}
    found = trades.trade_table(NAMES, {"exmate": {"pareto": pareto, "cosa": {"kind": ci(0.2), "brief": ci(-0.1)}}, "clm": {}})
    assert texts(found) == [["exmate", "0.40", "0.55", "0.0123", "0.20", f"{MINUS}0.10"]]
    assert found.header[-2:] == ("CoSA, kind to be kept", "CoSA, brief to be kept")
    assert trades.trade_table(NAMES[:1], {"exmate": {"pareto": pareto}}) is None


def test_level_cells():
    before, after = cell_figures(NAMES, (2, 2), {"1,1": 5, "2,1": 3}, {"1,1": 3})
    assert traces(before)[0]["z"] == [[5, 0], [3, 0]] and before.title == "Before distillation: 8 rows"
    assert before.rows == [["kind", "brief", "rows"], [1, 1, 5], [1, 2, 0], [2, 1, 3], [2, 2, 0]] and after.rows[1] == [1, 1, 3]
    kind, brief, _ = cell_figures([*NAMES, "third"], (2, 2, 1), {"1,1,1": 6, "2,1,1": 2}, {})
    assert traces(kind)[0]["y"] == [75, 25] and kind.rows[1:] == [["before", 1, 6], ["before", 2, 2]]
    assert traces(brief)[0]["y"] == [100, 0]


def test_curves_save_what_they_draw():
    curves = {"clm": [{"step": 1, "nll": 2.0}, {"step": 2, "nll": None}], "exmate": [{"step": 1, "nll": 1.5}]}
    (nll,) = training.curve_figures(curves, LOOK)
    assert list(map(list, nll.rows)) == [["method", "step", "nll"], ["clm", 1, 2.0], ["exmate", 1, 1.5]]
