"""A whole run on an object store: every stage reads and writes there, with one attribute, and a second run finds it all done."""

from __future__ import annotations

import pytest

from ctrlray import config, pipeline, runs
from tests.e2e.tiny_job import tiny_job

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]
ONE = {
    "control": {"attributes": [{"name": "brevity", "levels": 2}]},
    "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}],
}


@pytest.fixture(scope="module")
def run(tiny, private_cache, local_ray, bucket):
    return pipeline.run(config.parse(config.Job, tiny_job(tiny, bucket.format("whole"), ONE), where="t"))


def test_every_stage_is_on_the_object_store(run):
    storage = run.storage
    assert not storage.is_local and set(storage.folders()) >= set(pipeline.STAGES) - {"report"}
    manifest = storage.read_json("manifest.json")
    assert set(manifest["stages"]) == set(pipeline.STAGES)
    for stage, r in manifest["stages"].items():
        assert r["rows_in"] == r["rows_out"] + sum(r["dropped"].values()) + sum(r["quarantined"].values()), stage
    assert b"brevity" in storage.read_bytes("report.html")
    assert any(n.endswith(".safetensors") for n in run.out("export").names("model"))
    assert run.out("train").sub("exmate").exists("adapter", "adapter.safetensors")


def test_a_second_run_finds_everything(run):
    before = {s: run.result(s)["started"] for s in pipeline.STAGES}
    assert {s: r["started"] for s in pipeline.STAGES if (r := pipeline.run(run.job).result(s))} == before
    assert runs.summary(run.storage).stages == pipeline.STAGES and runs.stale(run.storage) == []
