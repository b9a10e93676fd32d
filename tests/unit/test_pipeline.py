"""What redoes which stage, what a stage must leave, when a cluster is refused; without stages that are real."""

from __future__ import annotations

import shutil
import time

import pytest
import yaml

from ctrlray import config, lease, models, pipeline, schema
from ctrlray.errors import ClusterError, ConfigError, DataError
from ctrlray.ledger import Silent, StageResult
from ctrlray.pipeline import STAGES, Run
from ctrlray.placement import Node
from ctrlray.tables import from_rows

RAW = {
    "name": "t",
    "control": {"attributes": [{"name": "brevity", "levels": 2}]},
    "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}],
    "prompts": {"train": 20, "eval": 4},
}


def job(**extra):
    return config.parse(config.Job, RAW | extra, where="t")


def redone(before, after):
    """Stages whose key differs."""
    return [s for s in STAGES if Run(before).keys[s] != Run(after).keys[s]]


FROM = {s: list(STAGES[STAGES.index(s) :]) for s in STAGES}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"seed": 1}, FROM["prompts"]),
        ({"prompts": {"train": 21, "eval": 4}}, FROM["prompts"]),
        ({"model": {"name": "other/model"}}, FROM["generate"]),
        ({"generate": {"samples": 7}}, FROM["generate"]),
        ({"generate": {"sampling": {"temperature": 0.5}}}, FROM["generate"]),
        # answers are sampled and scored without codes
        ({"control": {"attributes": [{"name": "brevity", "levels": 3}]}}, FROM["distill"]),
        ({"control": {"attributes": [{"name": "brevity", "levels": 2}], "encoding": "text"}}, FROM["distill"]),
        ({"control": {"attributes": [{"name": "short", "levels": 2, "score": "brevity"}]}}, FROM["score"]),
        ({"distill": {"keep_truncated": True}}, FROM["score"]),
        ({"distill": {"max_examples": 7}}, FROM["distill"]),
        ({"train": {"epochs": 3}}, FROM["train"]),
        ({"train": {"workers": 2}}, FROM["train"]),
        ({"evaluate": {"samples": 2}}, ["evaluate", "report"]),
        ({"export": {"dtype": "float32"}}, ["export", "report"]),
        # how, not what: nothing is sampled or trained again
        ({"generate": {"batch_size": 7, "pool": {"cpus": 0.25}, "engine": {"max_num_seqs": 7}}}, ["report"]),
        ({"train": {"max_failures": 7, "cpus_per_worker": 2.0, "activation_checkpointing": True}}, ["report"]),
        ({"evaluate": {"batch_size": 7}}, ["report"]),
        ({"score": {"batch_size": 7}}, ["report"]),
        ({"cluster": {"cpus": 1}, "trackers": [{"type": "wandb"}]}, []),
    ],
)
def test_a_change_redoes_what_it_affects_and_nothing_else(change, stages):
    assert redone(job(), job(**change)) == stages


def test_a_new_layout_of_the_tables_resumes_nothing(monkeypatch):
    before = Run(job()).keys
    monkeypatch.setattr(pipeline.schema, "VERSION", pipeline.schema.VERSION + 1)
    assert not set(before.values()) & set(Run(job()).keys.values())


def test_new_bytes_under_an_old_name_are_seen(tmp_path, tiny):
    asked, heads, model = tmp_path / "asked.jsonl", tmp_path / "my.safetensors", tmp_path / "model"
    asked.write_text('{"prompt": "one"}')
    heads.write_bytes(b"one")
    shutil.copytree(tiny, model)
    made = job(
        prompts={"sources": [{"type": "file", "path": str(asked)}]},
        rewards=[{"type": "embedded", "heads": str(heads)}],
        model={"name": str(model)},
    )
    before = Run(made).keys
    weights = model / "model.safetensors"
    for file, new, first in (
        (heads, b"two", "score"),
        (weights, weights.read_bytes()[:-4] + b"\0\0\0\1", "generate"),
        (asked, b'{"prompt": "two"}', "prompts"),
    ):
        file.write_bytes(new)
        after = Run(made).keys
        assert [s for s in STAGES if after[s] != before[s]] == FROM[first]
        before = after


def test_changes_name_settings_that_came_and_went(tmp_path):
    base = {"run_root": str(tmp_path)}
    run = Run(job(**base, generate={"behaviours": [{"name": "a"}]}))
    assert run.changes() == []
    run.storage.write_bytes(yaml.safe_dump(run.job.model_dump(mode="json")).encode(), "job.yaml")
    assert Run(run.job).changes() == []
    more = Run(job(**base, seed=1, generate={"behaviours": [{"name": "a"}, {"name": "b"}]})).changes()
    assert "seed: 0 -> 1" in more and "generate.behaviours.1.name: (unset) -> b" in more
    run.storage.write_bytes(b"name: [", "job.yaml")
    assert Run(run.job).previous is None and Run(run.job).state("prompts") == "never ran"


def test_a_stage_that_loses_a_row_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setitem(pipeline._RUNNERS, "prompts", lambda run, progress: StageResult(3, 2))
    made = job(run_root=str(tmp_path))
    with pytest.raises(DataError, match=r"prompts: 3 rows came in, 2 went out.*1 are unaccounted for"):
        pipeline.run(made, ["prompts"])
    assert Run(made).result("prompts") is None


def test_a_stage_without_its_input_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="distill needs the output of score; run `ctrlray score` or `ctrlray pipeline` first"):
        pipeline.run(job(run_root=str(tmp_path)), ["distill"])


def test_a_finished_stage_is_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setitem(pipeline._RUNNERS, "prompts", lambda run, progress: ran.append(1) or StageResult(1, 1))
    for _ in range(2):
        pipeline.run(job(run_root=str(tmp_path)), ["prompts"])
    assert ran == [1]


def test_a_run_whose_root_was_taken_over_stops_before_its_next_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.02)

    def taken(run, progress):
        theirs = {"id": "x", "machine": "m", "host": "elsewhere", "pid": 7, "renewed": time.time()}
        while not run.storage.exists(lease.FILE) or run.storage.read_json(lease.FILE)["id"] != "x":
            run.storage.write_json(theirs, lease.FILE)  # again if a renewal was on its way
            time.sleep(0.3)
        return StageResult(1, 1)

    monkeypatch.setitem(pipeline._RUNNERS, "prompts", taken)
    with pytest.raises(ConfigError, match=r"another run is writing.*process 7 on elsewhere"):
        pipeline.run(job(run_root=str(tmp_path)), ["prompts", "distill"])


@pytest.fixture
def cluster(monkeypatch):
    """`(asked, nodes)`: what an autoscaler was asked for, and the nodes that are there, by look."""
    import ray.autoscaler.sdk as sdk

    asked, looks = [], [[Node(1, 0, 64)]]
    monkeypatch.setattr(sdk, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(models, "resolve", lambda model: None)
    monkeypatch.setattr(models, "shape", lambda folder: None)
    monkeypatch.setattr(pipeline, "_GROWTH_POLL_S", 0.01)
    monkeypatch.setattr(pipeline, "nodes", lambda: looks.pop(0) if len(looks) > 1 else looks[0])
    return asked, looks


def wants_two_cpus(wait_s):
    return job(train={"workers": 2}, cluster={"autoscale_timeout_s": wait_s})


def test_a_job_that_fits_asks_for_nothing(cluster):
    pipeline._await_fit(job(), Silent(), "generate")
    assert cluster[0] == []


def test_a_cluster_that_grows_is_waited_for_and_its_request_withdrawn(cluster):
    asked, looks = cluster
    looks += [[Node(1, 0, 64)], [Node(2, 0, 64)]]
    pipeline._await_fit(wants_two_cpus(30.0), Silent(), "train")
    assert asked == [[{"CPU": 1.0}, {"CPU": 1.0}], []]


def test_a_cluster_that_grows_need_not_hold_a_later_stage_yet(cluster):
    pipeline._await_fit(wants_two_cpus(30.0), Silent(), "generate")
    assert cluster[0] == []
    with pytest.raises(ClusterError, match="train needs 2 CPUs"):  # one that stays as it is never will
        pipeline._await_fit(wants_two_cpus(0.0), Silent(), "generate")


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
def test_a_refused_job_leaves_no_request_behind(cluster, wait_s):
    """Ray keeps a request when the driver that made it is gone: nodes would come, and stay, for nobody."""
    with pytest.raises(ClusterError, match="train needs 2 CPUs, the cluster has 1: 1 too few") as caught:
        pipeline._await_fit(wants_two_cpus(wait_s), Silent(), "train")
    assert ("Waited 0.05 s" in str(caught.value)) == bool(wait_s)
    assert cluster[0] == ([[{"CPU": 1.0}, {"CPU": 1.0}], []] if wait_s else [])


def test_a_job_that_does_not_fit_starts_no_stage(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "start_ray", lambda wanted: None)
    monkeypatch.setitem(pipeline._RUNNERS, "prompts", lambda run, progress: StageResult(1, 1))
    monkeypatch.setitem(pipeline._RUNNERS, "generate", lambda run, progress: pytest.fail("it does not fit"))
    with pytest.raises(ClusterError, match="train needs 2 CPUs"):
        pipeline.run(job(run_root=str(tmp_path), train={"workers": 2}), ["prompts", "generate"])


def test_nodes_that_died_hold_nothing(monkeypatch):
    import ray

    there = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8.0 * 2**30, "reward": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [there, there | {"Alive": False}])
    (node,) = pipeline.nodes()
    assert node[:3] == (4.0, 0, 8.0) and "reward" in node.groups


@pytest.mark.parametrize(
    ("setting", "variable", "expected"), [("ray://a", "b:1", "ray://a"), (None, "b:1", "b:1"), (None, None, "local")]
)
def test_the_job_s_address_comes_before_the_environment_s(monkeypatch, setting, variable, expected):
    import ray

    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(asked))
    monkeypatch.setattr(ray, "init", lambda **more: asked.append(more["address"]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    for _ in range(2):  # the second finds it started
        pipeline.start_ray(config.Cluster(address=setting))
    assert asked == [expected]


def test_answers_for_rewards_are_finished_ones_with_their_prompts(tmp_path, monkeypatch):
    made = job(run_root=str(tmp_path))
    run = Run(made)
    chats = {split: [{"role": "user", "content": split}] for split in ("train", "eval")}
    prompts = [{"prompt_id": s, "messages": c, "source": "s", "split": s} for s, c in chats.items()]
    run.out("prompts").write_table(from_rows(prompts, schema.PROMPTS), "prompts")
    row = {"prompt_id": "train", "behaviour": "b", "token_ids": [1], "logprob_sum": 0.0, "weights_version": 0, "prompt_tokens": 1}
    said = [("b", "yes", "stop"), ("a", "Well.", "sentence"), ("c", "and so", "length"), ("d", "  ", "stop")]
    rows = [row | {"response_id": i, "text": text, "finish_reason": reason} for i, text, reason in said]
    run.out("generate").write_table(from_rows(rows, schema.RESPONSES), "responses")
    monkeypatch.setattr(pipeline, "run", lambda job, stages, progress: run)
    assert pipeline.finished_answers(made) == [(chats["train"], "Well."), (chats["train"], "yes")]


def test_how_a_reward_is_asked_changes_no_score():
    asked = {"type": "http", "url": "http://s/v1", "attributes": ["brevity"]}
    before = job(rewards=[asked])
    assert redone(before, job(rewards=[asked | {"timeout_s": 5, "retries": 1, "concurrency": 2, "batch_size": 3}])) == ["report"]
    assert redone(before, job(rewards=[asked | {"url": "http://t/v1"}])) == FROM["score"]


JUDGE = {"type": "function", "target": "m:f", "attributes": ["brevity"], "judge": True}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [JUDGE]),
        ([JUDGE], [JUDGE | {"target": "m:g"}]),
        ([JUDGE], [{"type": "http", "url": "http://s/v1", "attributes": ["brevity"], "judge": True}]),
    ],
)
def test_judges_redo_the_evaluation_and_nothing_else(before, after):
    for first in (True, False):  # wherever they stand among the rewards

        def with_judges(judges, first=first):
            return job(rewards=[*judges, *RAW["rewards"]] if first else [*RAW["rewards"], *judges])

        assert redone(with_judges(before), with_judges(after)) == ["evaluate", "report"]


def test_a_judge_s_heads_are_seen_by_their_bytes(tmp_path):
    heads = tmp_path / "j.safetensors"
    heads.write_bytes(b"one")
    made = job(rewards=[*RAW["rewards"], {"type": "tfidf", "heads": str(heads), "judge": True}])
    before = Run(made).keys
    heads.write_bytes(b"two")
    assert [s for s in STAGES if Run(made).keys[s] != before[s]] == ["evaluate", "report"]


def test_how_a_judge_is_asked_changes_nothing_that_it_says():
    asked = {"type": "http", "url": "http://s/v1", "attributes": ["brevity"], "judge": True}
    before = job(rewards=[*RAW["rewards"], asked])
    assert redone(before, job(rewards=[*RAW["rewards"], asked | {"retries": 1, "batch_size": 3}])) == ["report"]


def test_sets_redo_the_evaluation_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "prompts" / "mt_bench_80.jsonl"
    file.parent.mkdir()
    file.write_text('{"turns": ["one"]}')
    monkeypatch.setenv("CTRLRAY_DATA", str(tmp_path))
    asked = {"name": "mt", "sources": [{"type": "benchmark", "name": "mt_bench"}]}
    with_set = job(evaluate={"sets": [asked]})
    assert redone(job(), with_set) == redone(with_set, job(evaluate={"sets": [asked | {"limit": 3}]})) == ["evaluate", "report"]
    before = Run(with_set).keys
    file.write_text('{"turns": ["two"]}')
    assert [s for s in STAGES if Run(with_set).keys[s] != before[s]] == ["evaluate", "report"]


def test_a_prompt_file_that_is_gone_counts_as_the_run_noted_it(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "hi"}\n')
    current = Run(job(run_root=str(tmp_path / "run"), prompts={"sources": [{"type": "file", "path": str(file)}]}))
    before = current.keys
    pipeline._write_manifest(current)
    file.unlink()
    assert Run(current.job).keys == before
    other = job(run_root=str(tmp_path / "other"), prompts={"sources": [{"type": "file", "path": str(file)}]})
    with pytest.raises(ConfigError, match=r"prompts\.sources: path=.*no such file"):
        Run(other).keys  # noqa: B018
