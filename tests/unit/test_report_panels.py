"""Reward hacking, refusals and cost in the report, by hand, and which panels and data its page holds."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ctrlray import reporting
from ctrlray.stages import report_checks as checks
from ctrlray.stages import report_cost as cost
from ctrlray.stages.report import render
from ctrlray.stages.report_alarms import alarms_of
from ctrlray.tables import Storage
from tests.evaluated import costs, full_data
from tests.reports import DASH, LOOK, MINUS, Page, ci, sections, texts, traces


def course(alarm):
    points = [
        {"step": 4, "reward": -1.0, "judge": -1.2, "kl": None, "length": 30.0, "rollouts": 8},
        {"step": 8, "reward": -0.5, "judge": -1.5, "kl": 0.7, "length": 41.0, "rollouts": 7},
    ]
    changes = [{"from": [1, 3], "to": [6, 8], "reward": ci(0.5), "judge": ci(-0.3)}]
    return {"ppo": {"points": points, "rule": "alarm: they part", "alarm": alarm, "changes": changes}}


def test_reward_hacking_panel():
    both, kl, length = checks.hacking_figures(course(True))
    assert [t["y"] for t in traces(both)] == [[-1.0, -0.5], [-1.2, -1.5]] and "they part" in both.note
    assert list(map(list, both.rows[1:])) == [[4, -1.0, -1.2, 8], [8, -0.5, -1.5, 7]]
    assert (traces(kl)[0]["x"], traces(kl)[0]["y"]) == ([8], [0.7]) and traces(length)[0]["y"] == [30.0, 41.0]
    (row,) = checks.hacking_table(course(True)).rows
    assert [c.text for c in row] == ["ppo", "steps 1 to 3", "steps 6 to 8", "0.50", f"{MINUS}0.30"]
    assert [c.tone for c in row[3:]] == ["good", "bad"] and checks.hacking_table({}) is None
    assert "do not part" in checks.hacking_figures(course(False))[0].note


def test_reward_hacking_raises_an_alarm():
    (alarm,) = alarms_of([], [], course(True))
    assert alarm["name"] == "reward and judge part" and "ppo" in alarm["detail"] and "kl.coefficient" in alarm["advice"]
    assert alarms_of([], [], course(False)) == []
    shown, quiet = (Page(render(replace(full_data(), hacking=course(a)))) for a in (True, False))
    assert "Training reward and judge part for ppo." in shown.words and "judge part for" not in quiet.words
    assert [sum(a.get("role") == "alert" for _, a in page.tags) for page in (shown, quiet)] == [1, 0]


def rate(value, num_answers=40):
    return ci(value, 0.05) | {"num_answers": num_answers}


def test_refusals_along_the_dial():
    rates = {"1": {"safe": rate(0.1), "unsafe": rate(0.4)}, "3": {"safe": rate(0.35)}}
    refusals = {"xstest": {"attribute": "kind", "methods": {"exmate": rates, "start": {"1": {"safe": rate(0.2)}}}}}
    safe, unsafe = checks.refusal_figures(refusals, LOOK)
    assert (safe.title, unsafe.title) == ("xstest: safe", "xstest: unsafe")
    exmate, start = traces(safe)
    assert exmate["y"] == [10, 35] and exmate["error_y"]["array"] == pytest.approx([5, 5]) and start["y"] == [20]
    assert json.loads(safe.spec)["layout"]["xaxis"]["tickvals"] == [1, 3] and len(traces(unsafe)) == 1
    assert list(map(list, safe.rows[1:3])) == [["exmate", 1, 0.1, 0.05, 0.15], ["exmate", 3, 0.35, 0.3, 0.4]]
    (found,) = checks.refusal_tables(refusals)
    assert found.header == ("Method", "safe, kind 1", "safe, kind 3", "unsafe, kind 1")
    assert texts(found) == [["exmate", "10%", "35%", "40%"], ["start", "20%", DASH, DASH]]
    assert found.rows[0][1].note == "[5%, 15%] of 40"


def test_cost_chart_and_table():
    found, projections = costs()
    seconds, held = cost.cost_figures(found)
    work, start = traces(seconds)
    # scoring streamed behind generation and has no bar of its own; training: 640 s, 590 of them steps
    assert work["y"] == ["prompts", "generate", "distill", "train", "evaluate", "export"]
    assert work["x"] == pytest.approx([0.6, 186.6, 1.1, 590, 449, 6.2]) and start["x"] == pytest.approx([0, 27.4, 0, 50, 31, 0])
    assert seconds.rows[2] == ("generate", pytest.approx(186.6), 27.4)
    assert dict(zip(traces(held)[0]["y"], traces(held)[0]["x"], strict=True))["train"] == 1280  # two CPUs
    rows = {row[0].text: row for row in cost.cost_table(found).rows}
    assert [c.text for c in rows["generate"]][1:8] == ["720", "24,310", "130.3", "3 min 34 s", "27.4 s", "2 CPU", "428"]
    # seconds of all stages: 0.6 + 214 + 96 + 1.1 + 640 + 480 + 6.2 = 1437.9
    assert rows["generate"][8].value == pytest.approx(214 / 1437.9) and rows["score"][0].note == "streamed with generate"
    assert cost.cost_table(found).data()[2][3:6] == [130.3, 214.0, 27.4] and cost.cost_table(found).data()[0][4] == "Time, s"
    assert rows["total"][4].text == "23 min 58 s" and rows["total"][2].text == "176,510"
    scaled = cost.projection_table(found, projections)
    assert scaled.header == ("Stage", "This run", "135 million parameters, 7,200 answers", "7.0 billion parameters, 720 answers")
    # ten times the work of 186.6 s, and a start-up of 27.4 s
    assert {row[0].text: row for row in scaled.rows}["generate"][2].value == pytest.approx(1893.4)


PANELS = {
    "hacking": {"hacking": {}},
    "refusals": {"refusals": {}},
    "cost": {"costs": {}, "projections": ()},
    "samples": {"samples": ()},
    "training": {"curves": {}},
    "levels": {"cells_before": {}, "cells_after": {}},
    "ran": {"ledger": ()},
}


def test_every_panel_is_there_with_data_and_gone_without():
    everything = sections(render(full_data()))
    assert everything == {*PANELS, "verdict", "alarms", "dial", "metrics", "trades", "slopes", "inputs"}
    for panel, nothing in PANELS.items():
        assert sections(render(replace(full_data(), **nothing))) == everything - {panel}
    unjudged = Page(render(replace(full_data(), judge={}, judge_comparisons=(), correlation={}, hacking={}, sets={}, samples=())))
    assert "The judge" not in unjudged.words and "Other prompt sets" not in unjudged.words


def test_the_page_holds_the_data_of_its_figures_and_tables():
    page = Page(render(full_data()))
    saved = page.data("rows")
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert len(saved) == tables + len(page.data("spec"))
    assert all(len({len(row) for row in rows}) == 1 and len(rows) > 1 for rows in saved)
    hypervolume = next(rows for rows in saved if "Hypervolume (1 is all)" in rows[0])
    wanted = full_data().metrics["exmate"]["pareto"]["hypervolume"]
    (row,) = [r for r in hypervolume if r[0] == "exmate"]
    assert row[1:4] == [wanted["value"], wanted["low"], wanted["high"]]


def test_samples_can_be_filtered_by_method_level_and_words():
    page = Page(render(full_data()))
    options = [a for t, a in page.tags if t == "select"]
    assert [o.get("data-axis") for o in options] == [None, "0", "1"]
    assert [a["type"] for t, a in page.tags if t == "input"] == ["search"]
    groups = [a["data-method"] for t, a in page.tags if t == "details" and "data-method" in a]
    assert groups == ["start", "prompting", "reranking", "clm", "exmate", "ppo"] * 2
    levels = [a.get("data-levels") for t, a in page.tags if t == "article"]
    assert levels[:4] == [None, "1,1", "1,2", "1,3"]  # the starting model's one answer was given to no setting
    first = full_data().samples[1]["cells"][0]
    assert f"{first['units'][0]:.2f} judge {first['judge'][0]:.2f}" in page.words


def test_the_evaluations_files_reach_the_report(tmp_path):
    out = Storage(str(tmp_path))
    judge = {"exmate": {"num_prompts": 3}, "correlation": {"kind": {"num_answers": 5}}}
    files = {"judge": judge, "comparisons": [{"first": "a"}], "metrics-mt": {"exmate": {}}, "judge-mt": {"exmate": 1}}
    for name, values in files.items():
        out.write_json(values, f"{name}.json")
    out.write_json([{"first": "b"}], "judge", "comparisons.json")
    found = reporting._evaluated(SimpleNamespace(out=lambda stage: out))
    assert found["judge"] == {"exmate": {"num_prompts": 3}} and found["correlation"] == {"kind": {"num_answers": 5}}
    assert found["comparisons"] == [{"first": "a"}] and found["judge_comparisons"] == [{"first": "b"}]
    assert found["sets"] == {"mt": {"metrics": {"exmate": {}}, "judge": {"exmate": 1}}}
    assert found["hacking"] == found["refusals"] == {}
