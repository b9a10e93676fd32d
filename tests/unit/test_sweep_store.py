"""Shared tables: sealed, handed over byte for byte, and refused when they changed."""

from __future__ import annotations

import pytest

from ctrlray.errors import DataError
from ctrlray.pipeline import Run
from ctrlray.sweep import store
from ctrlray.sweep.plan import SHARED, load
from tests.unit.test_sweep_plan import ABLATION, write


@pytest.fixture
def plan(tmp_path):
    return load(write(tmp_path, variants=ABLATION))


@pytest.fixture
def shared(plan):
    """The first pool's run, with the files of finished stages."""
    run = Run(plan.pools[0].job)
    for stage in SHARED:
        out = run.out(stage)
        out.write_bytes(f"{stage} one".encode(), "table", "part-1.parquet")
        out.write_bytes(b"note", "in_flight", "0", "note.json")
        out.write_json({"facts": {}}, "result.json")
    store.seal(run)
    return run


def test_a_variant_gets_every_file_and_no_notes(plan, shared):
    run = plan.runs["text"]
    assert store.take(shared, run) == list(SHARED)
    assert run.out("score").files() == ["result.json", "table/part-1.parquet"]
    assert run.out("score").read_bytes("table", "part-1.parquet") == b"score one"
    assert run.result("generate") == {"facts": {}}
    assert store.take(shared, run) == []  # there already


def test_a_copy_that_was_cut_off_is_no_finished_stage(plan, shared, monkeypatch):
    run = plan.runs["text"]
    written = type(run.storage).write_bytes

    def full(self, data, *parts):
        if parts[-1] == "result.json":
            raise OSError("disk full")
        written(self, data, *parts)

    monkeypatch.setattr(type(run.storage), "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        store.take(shared, run)
    monkeypatch.undo()
    assert run.out("prompts").exists("table", "part-1.parquet") and run.result("prompts") is None
    assert store.take(shared, run) == list(SHARED)


@pytest.mark.parametrize("changed", [b"score two", None])
def test_a_shared_file_that_changed_is_not_handed_out(plan, shared, changed):
    out = shared.out("score")
    out.remove("table", "part-1.parquet")
    if changed:
        out.write_bytes(changed, "table", "part-1.parquet")
    with pytest.raises(DataError, match=r"score/.*part-1\.parquet is not what was sealed when .*Delete \S+/shared and"):
        store.take(shared, plan.runs["text"])
    assert plan.runs["text"].result("score") is None


def test_a_variant_whose_own_copy_changed_is_refused(plan, shared):
    run = plan.runs["text"]
    store.take(shared, run)
    run.out("generate").write_bytes(b"other answers", "table", "part-1.parquet")
    with pytest.raises(DataError, match=r"variants/text/generate/.*is not what was sealed.*Delete \S+/variants/text and"):
        store.take(shared, run)


def test_a_seal_is_of_one_key_and_is_not_renewed(plan, shared):
    shared.out("score").write_bytes(b"score two", "table", "part-1.parquet")
    store.seal(shared)  # what is there now is not what the stage wrote
    with pytest.raises(DataError, match="not what was sealed"):
        store.take(shared, plan.runs["text"])
    with pytest.raises(DataError, match=r"sealed under key .*, needed is"):
        store.take(shared, plan.runs["whole"])  # other scores


def test_a_stage_without_a_seal_is_not_handed_out(plan, shared):
    shared.out("prompts").remove(store.SEAL)
    with pytest.raises(DataError, match="the stage prompts has not finished there"):
        store.take(shared, plan.runs["text"])
