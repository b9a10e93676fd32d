"""Metrics and log lines: what is recorded of a stage, the dashboard's queries, and lines that carry run, stage and row."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from ctrlray import telemetry
from ctrlray.ledger import Silent
from ctrlray.telemetry import METRICS, Metered, Where, at, current, exported

ROOT = Path(__file__).parent.parent.parent
DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())
QUERIES = [t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]]
HERE = Where("r1", "train")


@pytest.fixture
def recorded(monkeypatch):
    """What would be recorded, in order: (where, name, value, labels)."""
    seen = []

    def record(where, name, value, **labels):
        assert set(labels) == set(METRICS[name].labels)
        seen.append((where, name, value, labels))

    monkeypatch.setattr(telemetry, "record", record)
    return seen


@pytest.mark.parametrize("root", ["/data/runs/r1", "/data/runs/r1/", "s3://bucket/runs/r1?region=x&access_key=secret/y"])
def test_a_run_is_named_by_its_root_and_a_stage_ends(root):
    with at(root, "train"):
        assert current() == HERE
    assert current() == telemetry.NOWHERE


def test_progress_is_passed_on_and_recorded(recorded):
    passed = []

    class Kept(Silent):
        def total(self, rows):
            passed.append(rows)

        def advance(self, rows, tokens=0):
            passed.append((rows, tokens))

        def measure(self, name, step, values):
            passed.append((name, step, values))

        def note(self, text):
            passed.append(text)

    values = {"loss": 2.0, "kl": 0.5, "error_safety": 1.5, "lr": 0.1}
    with at("/runs/r1", "train"):
        meter = Metered(Kept())
        meter.total(10)
        meter.advance(3)
        meter.advance(4, 50)
        meter.note("hello")
        meter.measure("ppo", 1, values)
    assert passed == [10, (3, 0), (4, 50), "hello", ("ppo", 1, values)]
    assert [(name, value) for _, name, value, _ in recorded[:5]] == [
        ("ctrlray_rows_wanted", 10),
        ("ctrlray_rows_done", 3),
        ("ctrlray_tokens", 0),
        ("ctrlray_rows_done", 7),
        ("ctrlray_tokens", 50),
    ]
    assert recorded[5:] == [
        (HERE, "ctrlray_loss", 2.0, {"objective": "ppo"}),
        (HERE, "ctrlray_kl", 0.5, {"objective": "ppo"}),
        (HERE, "ctrlray_level_error", 1.5, {"method": "ppo", "attribute": "safety"}),
    ]
    assert {where for where, *_ in recorded} == {HERE}


def test_accounts_of_finished_stages_are_told_by_reason_and_error(recorded):
    score = {"rows_in": 9, "rows_out": 5, "seconds": 2.5, "dropped": {"truncated": 3}, "quarantined": {"not_finite": 1}}
    with at("/runs/r1", "train"):
        telemetry.record_accounts({"score": score})
    where = Where("r1", "score")
    assert recorded == [
        (where, "ctrlray_rows_wanted", 9, {}),
        (where, "ctrlray_rows_done", 9, {}),
        (where, "ctrlray_stage_seconds", 2.5, {}),
        (where, "ctrlray_dropped_rows", 3, {"reason": "truncated"}),
        (where, "ctrlray_quarantined_rows", 1, {"error": "not_finite"}),
    ]


def test_level_errors_of_an_evaluation_are_those_of_its_metrics(recorded):
    known, unknown = ({"mae": {"value": v, "low": v, "high": v}} for v in (0.75, None))
    telemetry.record_level_errors({"clm": {"attributes": {"safety": known, "help": unknown}}})
    assert recorded == [(telemetry.NOWHERE, "ctrlray_level_error", 0.75, {"method": "clm", "attribute": "safety"})]


def test_without_ray_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(telemetry, "_series", lambda name: pytest.fail("no Ray, no series"))
    monkeypatch.setitem(telemetry.sys.modules, "ray", None)
    telemetry.record(HERE, "ctrlray_kl", 1.0, objective="ppo")


def test_a_log_line_carries_run_stage_and_row_on_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        telemetry.warn(Where("r1", "score"), "quarantined, not_finite:\n  safety is nan", "5f2c")
        telemetry.warn(Where("r1", "evaluate"), "x" * 2000)
        telemetry.warn(telemetry.NOWHERE, "alone")
    first, second, third = (r.getMessage() for r in caplog.records if r.name == "ctrlray")
    assert first == "run=r1 stage=score row=5f2c: quarantined, not_finite: safety is nan"
    assert second.startswith("run=r1 stage=evaluate: xxx") and len(second) < 600
    assert third == "ctrlray: alone"


def test_rows_that_are_quarantined_together_take_one_line(caplog):
    died = {"row_id": "5f2c", "error": "process_died", "detail": "alone with it the engine ended"}
    bad = {"row_id": "7a", "error": "not_finite", "detail": "not_finite: safety is nan"}
    with caplog.at_level(logging.WARNING):
        for rows in ([died], [bad, died, died], []):
            telemetry.warn_quarantined(HERE, rows)
    about = f"run={HERE.run} stage={HERE.stage}"
    assert [r.getMessage() for r in caplog.records if r.name == "ctrlray"] == [
        f"{about} row=5f2c: quarantined, process_died: alone with it the engine ended",
        f"{about} row=7a: quarantined, not_finite: safety is nan, and 2 more with it",
    ]


def test_the_dashboard_draws_every_metric_and_no_other():
    named = {name for q in QUERIES for name in re.findall(r"ray_\w+", q)}
    assert named == {exported(name) for name in METRICS}


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda p: p["title"])
def test_its_queries_and_legends_use_labels_that_the_metrics_have(panel):
    for target in panel["targets"]:
        metrics = [m for name, m in METRICS.items() if re.search(rf"\b{exported(name)}\b", target["expr"])]
        labels = set(Where._fields).union(*(m.labels for m in metrics))
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
        assert metrics and grouped <= labels
        assert grouped == set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert target["expr"].count("{") == target["expr"].count('{run=~"$run"}')
        assert ("rate(" in target["expr"]) <= all(m.kind == "counter" for m in metrics)


def test_its_runs_are_those_that_a_metric_names():
    (run,) = (v for v in DASHBOARD["templating"]["list"] if v["name"] == "run")
    name = re.fullmatch(r"label_values\((\w+), run\)", run["query"])
    assert name is not None and name[1] in {exported(n) for n in METRICS}
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
