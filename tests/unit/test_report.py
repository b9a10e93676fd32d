"""The report page: self-contained, escaped, complete, and honest about what is missing."""

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from ctrlray.stages.report import ReportData, render
from ctrlray.stages.report_alarms import ADVICE, advice
from ctrlray.stages.report_figures import styles
from ctrlray.stages.report_tables import duration, interval, number, outside, unaccounted
from ctrlray.stages.report_verdict import verdict

NAMES = ("helpfulness", "harmlessness", "brevity")
EVIL = "<script>alert('x')</script><img src=\"http://evil.example/a.png\" onerror=alert(1)> & more \ud800"
EFFECT = {"start": 0.0, "prompting": 0.08, "exmate": 0.34, "clm": 0.15}


def ci(value, width):
    return {"value": value, "low": value - width, "high": value + width}


def attribute_metrics(effect, index):
    follows = effect / (1 + index)
    plain = {
        "mae": ci(0.92 - follows / 3, 0.08),
        "bias": ci(-0.11, 0.09),
        "spearman_rows": ci(follows, 0.1),
        "spearman_level_means": ci(min(1, 2 * follows), 0.2),
        "pairwise": ci(0.5 + follows / 2, 0.06),
    }
    adjusted = {k: ci(v["value"] * 0.96, 0.07) for k, v in plain.items()}
    return {**plain, "length_adjusted": adjusted}


def method_metrics(effect, names, levels):
    slopes = [[ci(effect if i == j else -effect / 2, 0.07) for j in range(len(names))] for i in range(len(names))]
    means = {
        a: {str(k): ci(2 + effect * (k - 2) / (1 + i), 0.15) for k in range(1, levels + 1)} for i, a in enumerate(names)
    }
    return {
        "num_rows": 144,
        "num_prompts": 16,
        "mean_tokens": 31.4,
        "finished": 0.93,
        "attributes": {a: attribute_metrics(effect, i) for i, a in enumerate(names)},
        "slopes": slopes,
        "slopes_length_adjusted": slopes,
        "level_means": means,
        "distinct_outputs": 0.0 if effect == 0 else 0.94,
    }


def cells(levels, num_attributes, start):
    settings = itertools.product(range(1, levels + 1), repeat=num_attributes)
    return {",".join(map(str, s)): start + 7 * (i % 5) for i, s in enumerate(settings)}


def curve(fall):
    points = [
        {
            "step": s,
            "loss": 2.4 - fall * s / 60,
            "nll": 2.2 - fall * s / 60,
            "leak": 0.1,
            "lr": 4e-4 * (1 - s / 61),
            "grad_norm": 1 + math.sin(s),
        }
        for s in range(1, 61)
    ]
    measured = [{"step": s, "valid_nll": 2.3 - fall * s / 80, "valid_gap": 0.002 * s * fall} for s in range(0, 61, 10)]
    return points + measured


def sample(prompt, method, names):
    corners = list(itertools.product((1, 2, 3), repeat=min(2, len(names))))
    settings = [c + (2,) * (len(names) - len(c)) for c in corners]
    text = "You can start with a short list of what matters most, then work down it. " * 2
    return {
        "prompt": prompt,
        "method": method,
        "cells": [
            {
                "levels": list(c),
                "text": text + f"({c})",
                "units": [x * 0.5 + 0.9 for x in c],
                "finish_reason": "length" if c[0] == 3 else "stop",
            }
            for c in settings
        ],
    }


def ledger():
    return [
        {
            "stage": "prompts",
            "rows_in": 256,
            "rows_out": 112,
            "dropped": {"not_needed": 144},
            "quarantined": {},
            "seconds": 0.4,
            "tokens": None,
            "status": "done",
        },
        {
            "stage": "generate",
            "rows_in": 576,
            "rows_out": 575,
            "dropped": {},
            "quarantined": {"prompt_too_long": 1},
            "seconds": 187.0,
            "tokens": 24310,
            "status": "done",
        },
        {
            "stage": "distill",
            "rows_in": 575,
            "rows_out": 243,
            "dropped": {"truncated": 61, "inner": 190, "balance": 81},
            "quarantined": {},
            "seconds": 0.9,
            "tokens": None,
            "status": "done",
        },
        {
            "stage": "train",
            "rows_in": 243,
            "rows_out": 243,
            "dropped": {},
            "quarantined": {},
            "seconds": 402.0,
            "tokens": 61200,
            "status": "done",
        },
    ]


def report_data(num_attributes=2, **changes):
    names = NAMES[:num_attributes]
    metrics = {m: method_metrics(e, names, 3) for m, e in EFFECT.items()}
    prompts = ("How do I plan a week of dinners for four people?", "My neighbour is loud. How do I get back at him?")
    data = ReportData(
        job_name="quickstart",
        job_yaml="name: quickstart\nmodel:\n  name: embedded\n  max_context: 1024\n",
        model={"name": "SmolLM2-135M-Instruct", "fingerprint": "9f2c1b7a", "parameters": 134515008},
        versions={"ctrlray": "0.1.0", "ray": "2.60.0", "vllm": "0.32.0"},
        machine={"cpus": "2", "memory": "8 GiB", "gpus": "none"},
        started="2026-01-05 10:12 UTC",
        run_root="/home/user/.local/share/ctrlray/runs/quickstart",
        attributes=[{"name": n, "levels": 3} for n in names],
        ledger=ledger(),
        cells_before=cells(3, num_attributes, 41),
        cells_after=cells(3, num_attributes, 0),
        strategy="moec",
        curves={"exmate": curve(0.9), "clm": curve(0.5)},
        passes={"exmate": "one pass held a prompt once", "clm": "each answer was a sequence of its own"},
        code_gaps={"exmate": {**ci(0.083, 0.03), "num_examples": 38}, "clm": {**ci(0.01, 0.02), "num_examples": 38}},
        metrics=metrics,
        pool_slopes=[[1.0 if i == j else -0.41 for j in range(num_attributes)] for i in range(num_attributes)],
        samples=[sample(p, m, names) for p in prompts for m in ("start", "exmate")],
        alarms=[
            {"name": "empty cell", "severity": "warning", "detail": "helpfulness 1, harmlessness 1 holds no example."},
            {"name": "settings do not change the output", "severity": "error", "detail": "clm: 61% of the settings."},
            {"name": "some <odd> alarm", "severity": "info", "detail": "for what it is worth"},
        ],
        reward_card={"accuracy": {"helpfulness": ci(0.71, 0.07)}, "pairs": 280},
    )
    return replace(data, **changes)


class Page(HTMLParser):
    """Tags with attributes, text outside of scripts, the bodies of executable scripts, and data."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.scripts, self.stack, self.jsons = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1][0] == tag:
            self.stack.pop()

    def handle_data(self, data):
        if not self.stack:
            self.text.append(data)
        elif self.stack[-1] == ("script", {}):
            self.scripts.append(data)
        elif self.stack[-1][0] == "script":
            self.jsons.append((self.stack[-1][1].get("class"), data))

    def data(self, kind):
        """What the page's scripts of data hold: the plots' specifications ("spec"), or rows under a header ("rows")."""
        return [json.loads(text) for found, text in self.jsons if found == kind]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def body_of(html):
    """The page without plotly.js, small enough to search."""
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def test_page_is_self_contained():
    html = render(report_data())
    page = Page(html)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert not re.search(r"@import|url\(", body_of(html))
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
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


def sections(html):
    page = Page(html)
    found = {a["aria-labelledby"] for t, a in page.tags if t == "section" and "aria-labelledby" in a}
    assert found == {a["href"].removeprefix("#") for t, a in page.tags if t == "a"}  # the navigation names what is there
    return found


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


def test_verdict_goes_by_intervals():
    metrics = {"start": method_metrics(0.0, NAMES[:2], 3), "exmate": method_metrics(0.2, NAMES[:2], 3)}
    # pairwise of exmate: helpfulness 0.60 +- 0.06 excludes 0.5, harmlessness 0.55 +- 0.06 does not
    found = verdict(NAMES[:2], metrics, {"exmate": {**ci(0.08, 0.03), "num_examples": 38}}, {})
    assert "helpfulness follows the dial; harmlessness does not measurably" in found.headline
    assert "reads its control codes" in found.headline
    tones = {(f.method, f.text.split()[0]): f.tone for f in found.findings}
    assert tones["exmate", "helpfulness"] == "good" and tones["exmate", "harmlessness"] == "muted"
    assert tones["exmate", "A"] == "good" and [f.tone for f in found.baselines] == ["muted", "muted"]
    assert any("Only 16 prompts" in c for c in found.caveats)


def test_verdict_admits_failure_and_reversal():
    metrics = {"exmate": method_metrics(-0.4, NAMES[:1], 3)}
    found = verdict(NAMES[:1], metrics, {"exmate": {**ci(0.0, 0.01), "num_examples": 9}}, {})
    assert "shows no dial" in found.headline and "does not measurably read" in found.headline
    assert [f.tone for f in found.findings] == ["bad", "muted"]


def test_verdict_says_when_length_explains_the_dial():
    metrics = {"exmate": method_metrics(0.4, NAMES[:1], 3)}
    metrics["exmate"]["attributes"]["helpfulness"]["length_adjusted"]["pairwise"] = ci(0.51, 0.05)
    assert (
        "With answer length held constant this is no longer shown" in verdict(NAMES[:1], metrics, {}, {}).findings[0].text
    )


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
    assert (
        len({s.color for s in styles(["start", "prompting", "exmate", "clm", "reranking", "ppo", "x", "y"]).values()}) == 8
    )


def test_verdict_asks_the_judge():
    metrics = {"exmate": method_metrics(0.4, NAMES[:2], 3)}  # 0.70 and 0.60, each +- 0.06
    judge = {"exmate": {"attributes": {"helpfulness": {"pairwise": ci(0.6, 0.05)}, "harmlessness": {"pairwise": ci(0.5, 0.05)}}}}
    found = verdict(NAMES[:2], metrics, {}, judge)
    assert "helpfulness and harmlessness follow the dial (harmlessness not in the judge's eyes)" in found.headline
    assert "The judge agrees (60%, 55.0% to 65.0%)." in found.findings[0].text
    assert "The judge does not see it (50%, 45.0% to 55.0%)." in found.findings[1].text
    judge["exmate"]["attributes"]["helpfulness"]["pairwise"] = ci(0.4, 0.05)
    assert "The judge sees the opposite (40%" in verdict(NAMES[:2], metrics, {}, judge).findings[0].text
    assert "judge" not in verdict(NAMES[:2], metrics, {}, {}).headline


def test_verdict_names_a_code_that_is_read_wrongly():
    (found,) = verdict(NAMES[:1], {}, {"exmate": {**ci(-0.05, 0.01), "num_examples": 9}}, {}).findings
    assert "more likely" in found.text and found.tone == "bad"


def test_verdict_names_what_else_a_dial_moves_and_not_itself():
    texts = [f.text for f in verdict(NAMES[:2], {"exmate": method_metrics(0.4, NAMES[:2], 3)}, {}, {}).findings]
    assert "It also moves harmlessness by" in texts[0] and "It also moves helpfulness by" in texts[1]
    assert "helpfulness by" not in texts[0]
