"""A sweep on real engines: killed once in the middle of a variant, started again, finished, compared."""

from __future__ import annotations

import csv
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from ctrlray import schema
from ctrlray.pipeline import STAGES
from ctrlray.sweep.plan import SHARED, load
from tests.e2e.test_killed import group
from tests.e2e.tiny_job import tiny_job

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]


def start(file: Path):
    return group([sys.executable, "-m", "ctrlray", "sweep", str(file)], (file.parent / "log.txt").open("ab"))


def test_a_killed_sweep_goes_on_shares_its_answers_and_reports_the_variant_that_fails(tiny, private_cache, tmp_path):
    job = tiny_job(tiny, "/unused")
    del job["run_root"]
    variants = [
        {"name": "weight-0", "set": {"train.objectives": [{"type": "exmate", "weight": 0}]}},
        {"name": "crowd", "set": {"train.workers": 99}},
    ]
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "tiny", "job": job, "run_root": str(tmp_path / "root"), "variants": variants}))
    plan, log = load(file), tmp_path / "log.txt"
    base = plan.runs["base"]

    process = start(file)
    end = time.monotonic() + 900
    while not (reached := list(Path(base.storage.path()).glob("train/*/*/progress.json"))) and time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    assert reached, log.read_text()[-3000:]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(children, timeout=30)[1] == []  # nobody is left who writes to the roots
    assert base.result("train") is None and base.result("score") is not None
    shared = Path(plan.storage.path("shared"))
    answered = {f: f.stat().st_mtime_ns for f in shared.glob("*/*/*/*.parquet")}
    assert answered

    process = start(file)
    assert process.wait(timeout=1200) == 1, log.read_text()[-3000:]  # one variant does not fit on this machine
    assert {f: f.stat().st_mtime_ns for f in shared.glob("*/*/*/*.parquet")} == answered
    for name in ("base", "weight-0"):
        run = plan.runs[name]
        assert [s for s in STAGES if run.result(s) is None] == [], log.read_text()[-3000:]
        tables = [run.out("generate").read_table("responses", schema.RESPONSES)]
        assert tables[0].num_rows == 32 and tables[0].equals(base.out("generate").read_table("responses", schema.RESPONSES))
    assert plan.runs["crowd"].result("distill") is not None and plan.runs["crowd"].result("train") is None

    found = {v["variant"]: v for v in plan.storage.read_json("comparison.json")["variants"]}
    assert "train needs 99 CPUs" in found["crowd"]["error"]
    apart = found["weight-0"]["attributes"]["brevity"]["pairwise"]["difference"]
    assert found["weight-0"]["attributes"]["brevity"]["shared_prompts"] == 3 and apart["low"] <= apart["value"] <= apart["high"]
    rows = list(csv.DictReader(plan.storage.read_bytes("comparison.csv").decode().splitlines()))
    assert {(r["variant"], r["state"]) for r in rows} == {("base", "finished"), ("weight-0", "finished"), ("crowd", "failed")}
    assert b"weight-0" in plan.storage.read_bytes("comparison.html")

    before = len(log.read_text())
    assert start(file).wait(timeout=600) == 1
    again = log.read_text()[before:]
    assert "2 finished before" in again and "vLLM" not in again and f"{len(SHARED)} of" not in again
