"""Tables of the evaluated methods, by hand; what a table shows is also what it saves."""

import math

from ctrlray.stages import report_methods as methods
from ctrlray.stages.report_numbers import ends
from ctrlray.stages.report_tables import metric_cell, number_cell, percent_cell, table
from tests.reports import DASH, MINUS, ci, texts


def measured(pairwise, mae, **more):
    return {"attributes": {"kind": {"pairwise": pairwise, "mae": mae, **more}}}


def test_method_table_has_the_judge_beside_the_training_reward():
    metrics = {"start": measured(ci(0.5), ci(0.8)), "exmate": measured(ci(0.7), ci(0.5), length_adjusted={"pairwise": ci(0.52)})}
    judge = {"exmate": measured(ci(0.62), ci(0.7), length_adjusted={"pairwise": ci(0.45)})}
    found = methods.metric_table("kind", metrics, judge)
    assert found.groups == (("", 1), ("Training reward", 7), ("Judge", 3))
    start, exmate = found.rows
    assert [(c.text, c.note, c.tone) for c in exmate[1:3]] == [("0.70", "[0.60, 0.80]", "good"), ("0.50", "[0.40, 0.60]", "")]
    assert (exmate[8].text, exmate[8].tone) == ("0.62", "good") and (start[8].text, start[8].tone) == (DASH, "muted")
    held = methods.length_table("kind", metrics, judge)
    assert [row[0].text for row in held.rows] == ["exmate"] and (held.rows[0][1].text, held.rows[0][8].text) == ("0.52", "0.45")
    alone = methods.metric_table("kind", metrics, {})
    assert alone.groups == () and len(alone.header) == 8 == len(alone.rows[0])
    assert methods.metric_table("brief", metrics, judge) is None
    assert methods.length_table("kind", {"start": metrics["start"]}, {}) is None


def test_a_table_saves_full_precision_and_ends():
    found = methods.metric_table("kind", {"exmate": measured(ci(2 / 3), None)}, {"exmate": measured(ci(0.6), None)})
    header, row = found.data()
    own = "Training reward: Pairwise order accuracy (chance 0.5)"
    assert header[:4] == ["Method", own, f"{own}, low", f"{own}, high"]
    assert row[:4] == ["exmate", 2 / 3, round(2 / 3 - 0.1, 6), round(2 / 3 + 0.1, 6)]
    at = header.index("Judge: Pairwise order accuracy (chance 0.5)")
    assert row[at : at + 3] == [0.6, 0.5, 0.7] and row[4] is None and len(header) == len(row)
    nan = table("x", ("a", "b"), [["r", metric_cell({"value": math.nan, "low": math.nan, "high": 1.0})]]).data()
    assert nan == [["a", "b", "b, low", "b, high"], ["r", None, None, 1.0]] and ends(0.5) == (0.5, None, None)


def test_cells_of_numbers():
    assert (number_cell(720).text, number_cell(0.126).text, number_cell(None).text) == ("720", "0.13", DASH)
    share = percent_cell({"value": 0.126, "low": 0.01, "high": 0.2})
    assert (share.text, share.note) == ("13%", "[1%, 20%]") and percent_cell(None).text == DASH


def compared(first, second, statistic, value, p_holm):
    named = {"first": first, "second": second, "attribute": "kind", "statistic": statistic, "num_prompts": 24, "p": p_holm / 2}
    return named | (ci(value) if value is not None else {"value": None, "low": None, "high": None}) | {"p_holm": p_holm}


TESTS = [
    compared("start", "exmate", "pairwise", -0.2, 0.0004),
    compared("exmate", "clm", "pairwise", 0.1, 0.051),
    compared("start", "exmate", "mae", 0.3, 0.01),  # a lower error is better
    compared("exmate", "ppo", "mae", None, 1.0),
]


def test_marks_name_the_methods_that_are_beaten():
    assert methods.better_than("exmate", "kind", "pairwise", TESTS) == ("start",)
    assert methods.better_than("exmate", "kind", "mae", TESTS) == ("start",)
    assert methods.better_than("start", "kind", "pairwise", TESTS) == methods.better_than("exmate", "brief", "mae", TESTS) == ()
    metrics = {"exmate": measured(ci(0.7), ci(0.5))}
    (row,) = methods.metric_table("kind", metrics, metrics, (), TESTS).rows
    assert row[1].better_than == () and row[8].better_than == row[9].better_than == ("start",)  # the judge's own tests


def test_every_paired_test_is_listed():
    found = methods.comparison_table(TESTS, "the judge")
    assert texts(found)[0][:3] == ["start minus exmate", "kind", "Pairwise order accuracy"]
    assert texts(found)[0][3:] == [f"{MINUS}0.200", "< 0.001", "< 0.001", "24"]
    assert [row[5].tone for row in found.rows] == ["good", "muted", "good", "muted"]
    assert found.data()[2][3:8] == [0.1, 0.0, 0.2, 0.0255, 0.051] and "under the judge" in found.caption


def test_answers_and_prompt_sets():
    spread = {"distinct_1": ci(0.2), "distinct_2": ci(0.3), "repetition": ci(0.1), "refused": ci(0.25)}
    found = methods.text_table({"exmate": {"texts": {"tokens": ci(31.25), **spread}}, "clm": {}})
    assert texts(found) == [["exmate", "31.2", "0.20", "0.30", "0.10", "25%"]] and found.rows[0][5].note == "[15%, 35%]"
    own, judged = measured(ci(0.7), None) | {"num_prompts": 6}, measured(ci(0.55), None)
    found = methods.set_table("mt_bench", ["kind"], {"exmate": own}, {"exmate": judged})
    assert texts(found) == [["exmate", "6", "0.70", "0.55"]] and [c.tone for c in found.rows[0][2:]] == ["good", ""]
    assert texts(methods.set_table("mt_bench", ["kind"], {"exmate": own}, {})) == [["exmate", "6", "0.70"]]
    correlation = {"kind": {"overall": ci(0.6), "within_prompt": ci(0.05), "num_answers": 660}}
    (row,) = methods.correlation_table(correlation).rows
    assert [(c.text, c.tone) for c in row] == [("kind", ""), ("0.60", "good"), ("0.05", ""), ("660", "")]


def test_the_overview_has_what_an_answer_costs_where_it_was_measured():
    found = methods.overview_table({"start": {}, "reranking": {}}, {}, {"reranking": {"tokens": 281.25, "seconds": 1.5}})
    at = [found.header.index(h) for h in ("Tokens spent on an answer", "Engine seconds spent on an answer")]
    assert [[row[i].text for i in at] for row in found.rows] == [[DASH, DASH], ["281.2", "1.500"]]


def test_the_overview_has_the_log_prob_over_the_base_s_where_it_was_measured():
    drifted = {"start": {"num_rows": 9}, "exmate": {"num_rows": 9, "kl_base": {"value": 6.25, "low": 5.0, "high": 8.0}}}
    found = methods.overview_table(drifted, {}, {})
    at = found.header.index("Log-prob over the base's, nats/answer")
    start, exmate = (row[at] for row in found.rows)
    assert (start.text, exmate.text, exmate.note) == (DASH, "6.2", "[5.0, 8.0]")
