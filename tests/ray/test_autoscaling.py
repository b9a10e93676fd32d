"""Generation with scoring behind it on a cluster whose nodes come with the work, go with it, and are taken away."""

from __future__ import annotations

from collections import Counter

import pytest

from ctrlray import schema
from ctrlray.tables import Storage
from tests.ray.autoscaling import BATCH, ENGINES, PROMPTS
from tests.ray.fake_nodes import told

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("growing")


@pytest.fixture(scope="module")
def seen(folder):
    """One run of the whole story: what it saw of nodes and engines."""
    return told("tests.ray.autoscaling", str(folder), timeout_s=1000)


def rows(seen, what, *, after=0.0):
    return [row for note in seen["notes"] if note["what"] == what and note["at"] >= after for row in note["rows"]]


def test_queued_work_brings_nodes_up(seen):
    assert seen["nodes_at_first"] == 0
    assert seen["all_up"] and seen["nodes_at_most"] == ENGINES


def test_an_idle_pool_goes_down_to_its_minimum_and_idle_nodes_go(seen):
    """Engines while one of them holds the last batch; nodes when the stage is over."""
    assert seen["shrunk"] and 0 < seen["left_when_shrunk"] <= BATCH
    assert seen["emptied"]


def test_generation_and_scoring_overlap(seen, folder):
    """The batch that a node took with it was answered in parts, so it has more than one file."""
    answered = sorted(p.stat().st_mtime for p in (folder / "g" / "responses").glob("*.parquet"))
    scored = sorted(p.stat().st_mtime for p in (folder / "s" / "scores").glob("*.parquet"))
    assert len(answered) >= len(scored) == PROMPTS // BATCH
    assert scored[0] < answered[len(answered) // 4]


def test_a_spot_node_that_is_taken_away_costs_only_its_unfinished_rows(seen, folder):
    out = Storage(str(folder / "g"))
    responses = out.read_table("responses", schema.RESPONSES, ["response_id", "prompt_id"])
    scores = Storage(str(folder / "s")).read_table("scores", schema.scores(["length"]), ["response_id"])
    assert seen["rows_in"] == seen["rows_out"] == responses.num_rows == scores.num_rows == PROMPTS
    assert len(set(responses["prompt_id"].to_pylist())) == PROMPTS
    assert sorted(responses["response_id"].to_pylist()) == sorted(scores["response_id"].to_pylist())
    assert len(seen["finished_before"]) > PROMPTS // 4
    again = rows(seen, "begin", after=seen["taken_at"])
    assert not set(again) & set(seen["finished_before"]), "finished rows were answered again"
    twice = [row for row, times in Counter(rows(seen, "begin")).items() if times > 1]
    assert 0 < len(twice) <= BATCH, "the victim held one batch, and only that is done again"
    unfinished = {r for n in seen["notes"] if n["pid"] == seen["victim"] and n["what"] == "begin" for r in n["rows"]}
    assert set(twice) <= unfinished - set(seen["finished_before"])
