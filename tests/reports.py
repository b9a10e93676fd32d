"""What a report is made of in tests: made-up data of a run, and readers of the page, its figures and its tables."""

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

from ctrlray.stages.report import ReportData
from ctrlray.stages.report_figures import styles

NAMES = ("helpfulness", "harmlessness", "brevity")
EFFECT = {"start": 0.0, "prompting": 0.08, "exmate": 0.34, "clm": 0.15}
LOOK = styles(["start", "prompting", "clm", "exmate", "ppo"])
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def ci(value, width=0.1):
    return {"value": value, "low": round(value - width, 6), "high": round(value + width, 6)}


def texts(found):
    """What a table shows, row by row."""
    return [[cell.text for cell in row] for row in found.rows]


def traces(figure):
    """What plotly draws of a figure."""
    return json.loads(figure.spec)["data"]


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
    means = {a: {str(k): ci(2 + effect * (k - 2) / (1 + i), 0.15) for k in range(1, levels + 1)} for i, a in enumerate(names)}
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


def sections(html):
    page = Page(body_of(html))
    found = {a["aria-labelledby"] for t, a in page.tags if t == "section" and "aria-labelledby" in a}
    assert found == {a["href"].removeprefix("#") for t, a in page.tags if t == "a"}  # the navigation names what is there
    return found
