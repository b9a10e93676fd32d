"""The report page: self-contained, escaped, complete, and honest about what is missing."""

import math
import re

import pytest

from ctrlray.stages.report import ReportData, render
from ctrlray.stages.report_alarms import ADVICE, advice
from ctrlray.stages.report_figures import styles
from ctrlray.stages.report_numbers import duration, interval, number, outside
from ctrlray.stages.report_tables import unaccounted
from tests.reports import NAMES, Page, body_of, ci, curve, ledger, method_metrics, report_data, sections

EVIL = "<script>alert('x')</script><img src=\"http://evil.example/a.png\" onerror=alert(1)> & more \ud800"


def test_page_is_self_contained():
    html = render(report_data())
    page = Page(html)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert not re.search(r"@import|url\(", body_of(html))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "'unsafe-inline' script" not in policy
    assert policy.count("sha256-") == sum(t == "script" and not a for t, a in page.tags) == 2


def test_untrusted_text_is_escaped_everywhere():
    evil_cell = {"levels": [1, 1], "text": EVIL, "units": [1.0, None], "finish_reason": EVIL}
    html = render(
        report_data(
            job_name=EVIL,
            job_yaml=EVIL,
            model={"name": EVIL, "fingerprint": EVIL, "parameters": None},
            versions={EVIL: EVIL},
            samples=[{"prompt": EVIL, "method": EVIL, "cells": [evil_cell]}],
            alarms=[{"name": EVIL, "severity": EVIL, "detail": EVIL}],
            reward_card={EVIL: EVIL},
            strategy=EVIL,
            curves={EVIL: curve(1)},
            passes={EVIL: EVIL},
            metrics={EVIL: method_metrics(0.2, NAMES[:2], 3)},
            code_gaps={EVIL: {**ci(0.1, 0.2), "num_examples": 3}},
        )
    )
    body = body_of(html)
    assert "<script>alert" not in html and "<img" not in body and "alert('x')</script>" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in body
    page = Page(html)
    assert not [t for t, a in page.tags if t == "img" or any(k.startswith("on") for k in a)]
    html.encode("utf-8")  # a lone surrogate in an answer must not stop the page from being written


def test_every_alarm_is_shown_with_advice_worst_first():
    words = Page(render(report_data())).words
    assert "some <odd> alarm" in words and "empty cell" in words
    assert ADVICE["settings-do-not-change-the-output"] in words
    assert words.index("settings do not change the output") < words.index("holds no example") < words.index("<odd>")


@pytest.mark.parametrize("name", ["Empty_Cell", "empty-cell", "empty cell"])
def test_advice_is_found_however_the_name_is_written(name):
    assert advice(name) == ADVICE["empty-cell"]


@pytest.mark.parametrize("num_attributes", [1, 2, 3])
def test_any_number_of_attributes(num_attributes):
    html = render(report_data(num_attributes))
    page = Page(html)
    plots = [a for t, a in page.tags if t == "div" and a.get("class") == "plot"]
    assert len(plots) == len(page.data("spec")) and all(len(p["aria-label"]) > 20 for p in plots)
    heat_maps = {1: 0, 2: 2 + 5, 3: 5}[num_attributes]  # level cells only for two; slopes of 4 methods and the pool
    assert html.count('"type":"heatmap"') - Page(html).scripts[0].count('"type":"heatmap"') == heat_maps
    for name in NAMES[:num_attributes]:
        assert f"{name}: values with 95% intervals" in page.words


def test_a_pool_in_one_cell_has_its_panel():
    """As distillation leaves it when all scores are alike, before it and after."""
    page = Page(render(report_data(cells_before={"2,2": 9}, cells_after={"2,2": 9})))
    assert "Of 9 level cells, 8 are empty before and 8 are empty after." in page.words


def reinforcement(steps=5):
    return [
        {"step": i + 1, "reward": -2 + 0.1 * i, "kl": 0.2 * i, "generate_s": 4.0, "forward_s": 2.0, "length": 30.0}
        | {f"achieved_helpfulness_{level}": 2 + (level - 2) * 0.1 * i for level in (1, 3)}
        for i in range(steps)
    ]


def test_reinforcement_learning_has_its_own_plots():
    page = Page(render(report_data(curves={"exmate": curve(0.9), "ppo": reinforcement()})))
    labels = [a["aria-label"] for t, a in page.tags if t == "div" and a.get("class") == "plot"]
    assert "Reward by step: ppo from -2 at step 1 to -1.6 at step 5." in labels
    assert "helpfulness reached by level asked for, ppo: level 1 from 2.00 to 1.60; level 3 from 2.00 to 2.40." in labels
    (seconds,) = [text for text in labels if text.startswith("Seconds of a step, ppo")]
    assert "generate 4.00 s, score 0.00 s" in seconds and "forward 2.00 s" in seconds


def test_a_run_without_data_has_no_empty_panels():
    bare = render(ReportData("bare", "", {}, {}, {}, "", "", [{"name": "helpfulness", "levels": 5}]))
    assert sections(bare) == {"verdict", "alarms", "inputs"}
    words = Page(bare).words
    assert "nothing can be said about the dial" in words and "None was raised" in words


def test_undefined_statistics_are_dashes():
    metrics = {"exmate": method_metrics(0.3, NAMES[:2], 3)}
    nan = {"value": math.nan, "low": None, "high": None}
    metrics["exmate"]["attributes"]["helpfulness"]["pairwise"] = nan
    metrics["exmate"]["slopes"][0][1] = nan
    metrics["exmate"]["level_means"]["helpfulness"]["1"] = nan
    html = render(report_data(metrics=metrics, curves={"exmate": [{"step": 0}, {"step": 1, "loss": math.nan}]}))
    assert "nan" not in Page(html).words.lower() and "no comparable pairs" in html


def test_ledger_imbalance_is_flagged():
    good = render(report_data())
    assert "do not add up" not in good and "ledger does not balance" not in good
    broken = ledger()
    broken[1]["rows_out"] = 570
    words = Page(render(report_data(ledger=broken))).words
    assert "Rows do not add up in: generate" in words and "5 missing" in words
    assert "ledger does not balance" in words and "generate: 5 rows are unaccounted for" in words


def test_unaccounted_by_hand():
    # 575 in; 243 out + 61 + 190 + 80 dropped = 574: one is missing
    stage = {"rows_in": 575, "rows_out": 243, "dropped": {"a": 61, "b": 190, "c": 80}, "quarantined": {}}
    assert unaccounted(stage) == 1
    assert unaccounted({**stage, "quarantined": {"x": 2}}) == -1
    assert unaccounted({**stage, "rows_in": None}) is None


def test_numbers_for_readers():
    dash, minus = "\N{EN DASH}", "\N{MINUS SIGN}"
    shown = [number(x) for x in (None, math.nan, -0.513, -0.001, 1234567, 0)]
    assert shown == [dash, dash, f"{minus}0.51", "0.00", "1,234,567", "0"]
    assert [duration(s) for s in (4.21, 59.97, 185, 7620, None)] == [
        "4.2 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
        dash,
    ]
    assert interval({"value": 1, "low": None, "high": 2}) is None and interval(0.5) == (0.5, 0.5, 0.5)
    assert [outside(ci(x, 0.1), 0.5) for x in (0.3, 0.45, 0.7)] == [-1, 0, 1]


def test_known_methods_keep_their_style():
    assert styles(["exmate", "new"])["exmate"] == styles(["start", "clm", "exmate"])["exmate"]
    assert len({s.color for s in styles(["start", "prompting", "exmate", "clm", "reranking", "ppo", "x", "y"]).values()}) == 8
