"""What redoes which stage, what a stage must leave, when a cluster is refused; without stages that are real."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from ctrlray import config, inputs, lease, models, pipeline, runs, schema
from ctrlray.errors import ClusterError, ConfigError, DataError
from ctrlray.ledger import Silent, StageResult
from ctrlray.memory import Shape
from ctrlray.pipeline import STAGES, Run
from ctrlray.placement import Node
from ctrlray.tables import from_rows
from tests import fakes

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


SOURCE = "import unheard_of\n\n\ndef score(prompts, responses):\n    return [{}.0] * len(responses)\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function reward in a package that cannot be imported here; the file of its module."""
    package = tmp_path / "work" / "my_rewards_of_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "short.py").write_text(SOURCE.format(1))
    monkeypatch.chdir(tmp_path / "work")
    return package / "short.py"


TARGET = "my_rewards_of_tests.short:score"


@pytest.mark.parametrize(("judge", "stages"), [(False, FROM["score"]), (True, ["evaluate", "report"])])
def test_a_function_is_seen_by_its_source_without_being_imported(module, judge, stages):
    rewards = [{"type": "function", "target": TARGET, "attributes": ["brevity"], "judge": judge}]
    made = job(rewards=rewards + (RAW["rewards"] if judge else []))
    before = Run(made).keys
    assert Run(made).keys == before
    module.write_text(SOURCE.format(2))
    after = Run(made).keys
    assert [s for s in STAGES if after[s] != before[s]] == stages
    assert not [m for m in sys.modules if m.startswith("my_rewards_of_tests")]


def test_a_function_s_module_is_found_by_hand(module, monkeypatch, tmp_path):
    known = {
        TARGET: module,
        "my_rewards_of_tests:f": module.with_name("__init__.py"),
        "tests.fakes:length_reward": Path(fakes.__file__),
        "json:dumps": Path(json.__file__),
        "sys:f": None,
    }
    assert {target: inputs.source_file(target) for target in known} == known
    assert inputs.source_file("my_rewards_of_tests.absent:f") is None and inputs.source_file("absent_of_tests.a.b:f") is None
    (tmp_path / "work" / "spread" / "deep").mkdir(parents=True)  # packages without an __init__
    (tmp_path / "work" / "spread" / "deep" / "late.py").write_text("")
    assert inputs.source_file("spread.deep.late:f") == tmp_path / "work" / "spread" / "deep" / "late.py"
    monkeypatch.setitem(sys.modules, "made_by_hand", types.ModuleType("made_by_hand"))
    assert inputs.source_file("made_by_hand:f") is None


def test_a_function_that_is_not_here_counts_by_its_name_alone(tmp_path):
    absent = [{"type": "function", "target": f"absent_of_tests:{name}", "attributes": ["brevity"]} for name in "fg"]
    one, other = (job(rewards=[r]) for r in absent)
    assert Run(one).reads("score") == {"reward absent_of_tests:f": ""}
    assert redone(one, other) == FROM["score"]


@pytest.mark.parametrize(("judge", "stages"), [(False, FROM["score"]), (True, ["evaluate", "report"])])
@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_reward_s_folder_is_seen_by_what_decides_its_scores(tmp_path, tiny, judge, stages, part):
    folder = shutil.copytree(tiny, tmp_path / "reward")
    reward = {"type": "hf", "model": str(folder), "attributes": ["brevity"], "judge": judge}
    made = job(rewards=[reward, *(RAW["rewards"] if judge else [])])
    before = Run(made).keys
    (folder / "README.md").write_text("more")
    assert Run(made).keys == before
    content = (folder / part).read_bytes()
    (folder / part).write_bytes(content[:-4] + b"\0\0\0\1" if part.startswith("model") else content + b" ")
    after = Run(made).keys
    assert [s for s in STAGES if after[s] != before[s]] == stages


def test_an_input_that_cannot_be_read_is_named_with_the_next_step(monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ConfigError, match=r"p\.jsonl: cannot be read \(Permission denied\); make it readable, or correct"):
        inputs._hashed(Path("p.jsonl"))


def with_critic(model, **ppo):
    objectives = [{"type": "clm"}, {"type": "ppo", "advantage": "gae", "critic": {"model": str(model)}} | ppo]
    return job(train={"objectives": objectives})


def test_a_critic_s_folder_is_seen_by_its_weights(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "critic")
    made, without = with_critic(folder), with_critic(folder, advantage="rloo")
    before, unused = Run(made).keys, Run(without).keys
    assert Run(made).reads("train") == {f"critic {folder}": models.fingerprint(tiny)} and Run(without).reads("train") == {}
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    after = Run(made).keys
    assert [s for s in STAGES if after[s] != before[s]] == FROM["train"]
    assert Run(without).keys == unused
    assert Run(with_critic("org/m")).reads("train") == {"critic org/m": ""}


def test_a_critic_that_is_a_pickle_is_refused_before_anything_runs(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "critic")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = rf"^train\.objectives\.1\.critic\.model='{folder}': no \*\.safetensors; pytorch_model\.bin is a pickle"
    with pytest.raises(ConfigError, match=said):
        Run(with_critic(folder)).keys  # noqa: B018
    with pytest.raises(ConfigError, match=said):
        pipeline._await_fit(with_critic(folder), Silent(), "generate")


def test_a_critic_reaches_the_workers_as_a_folder(tmp_path, monkeypatch):
    """Fetched by the driver: what a hub refuses is said before anything starts, and in no worker."""
    from ctrlray.train import run as train

    asked = []
    monkeypatch.setattr(models, "resolve", lambda model, setting: asked.append((model.name, setting)) or tmp_path)
    made = with_critic("org/m")
    objective = made.train.objectives[1]
    assert train._with_critic(objective, made).critic == objective.critic.model_copy(update={"model": str(tmp_path)})
    assert asked == [("org/m", "train.objectives.1.critic.model")]
    plain = with_critic("org/m", advantage="rloo")
    assert train._with_critic(plain.train.objectives[1], plain) == plain.train.objectives[1] and len(asked) == 1


def test_a_changed_input_is_told_and_a_run_that_is_read_elsewhere_is_as_it_was(tmp_path, module, monkeypatch):
    made = job(run_root=str(tmp_path / "run"), rewards=[{"type": "function", "target": TARGET, "attributes": ["brevity"]}])
    results = {"prompts": StageResult(3, 3), "generate": StageResult(3, 3), "score": StageResult(3, 3)}
    monkeypatch.setattr(pipeline, "start_ray", lambda wanted: None)
    monkeypatch.setattr(pipeline, "_await_fit", lambda job, progress, stage: None)
    for stage, result in results.items():
        monkeypatch.setitem(pipeline._RUNNERS, stage, lambda run, progress, result=result: result)
    ran = pipeline.run(made, tuple(results))
    old = hashlib.sha256(SOURCE.format(1).encode()).hexdigest()[:16]
    assert ran.storage.read_json("manifest.json")["inputs"][f"reward {TARGET}"] == old
    assert Run(made).changes() == [] and Run(made).state("score") == "finished"
    module.write_text(SOURCE.format(2))
    new = hashlib.sha256(SOURCE.format(2).encode()).hexdigest()[:16]
    assert Run(made).changes() == [f"content of reward {TARGET}: {old} -> {new}"]
    assert (Run(made).state("score"), Run(made).state("generate")) == ("input changed", "finished")
    other = made.model_copy(update={"control": config.Control(attributes=(config.Attribute(name="x", score="brevity"),))})
    assert "control.attributes.0.name: brevity -> x" in Run(other).changes() and len(Run(other).changes()) == 4
    # what reads a run finds it, whatever became of its inputs; and so does the same job where the module is out of reach
    assert Run.at(ran.storage).keys == ran.keys and Run.at(ran.storage).result("score")["rows_out"] == 3
    monkeypatch.chdir("/")
    assert Run.at(ran.storage).keys == Run(made).keys == ran.keys
    assert runs.stale(ran.storage) == []


def test_what_a_run_reads_is_noted_before_its_first_stage(tmp_path, module, monkeypatch):
    """Else the job file that is kept and the inputs would be of two runs, when it is cut off in between."""
    made = job(run_root=str(tmp_path / "run"), rewards=[{"type": "function", "target": TARGET, "attributes": ["brevity"]}])
    monkeypatch.setitem(pipeline._RUNNERS, "prompts", lambda run, progress: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(made, ["prompts"])
    noted = Run(made).storage.read_json("manifest.json")
    assert noted["stages"] == {} and len(noted["inputs"][f"reward {TARGET}"]) == 16
    broken = job(run_root=str(tmp_path / "run"), prompts={"sources": [{"type": "file", "path": str(tmp_path / "none")}]})
    with pytest.raises(ConfigError, match="no such file"):
        pipeline.run(broken, ["prompts"])
    assert Run(made).previous.job == made and Run(made).changes() == []


def test_a_last_run_whose_inputs_nobody_noted_is_none(tmp_path):
    file = tmp_path / "p.jsonl"
    lost = job(run_root=str(tmp_path), prompts={"sources": [{"type": "file", "path": str(file)}]})
    Run(lost).storage.write_bytes(yaml.safe_dump(lost.model_dump(mode="json")).encode(), "job.yaml")
    assert Run(job(run_root=str(tmp_path))).previous is None


@pytest.fixture
def hub(monkeypatch):
    """A model on the hub, whose branch moves."""
    prints = ["a" * 16, "b" * 16]

    def prepare(model, space):
        return models.PreparedBase("folder", prints[0], "", ())

    monkeypatch.setattr(models, "prepare", prepare)
    prepare.move = lambda: prints.reverse()
    return prepare


def test_answers_of_two_models_under_one_name_are_refused(tmp_path, hub):
    made = job(run_root=str(tmp_path), model={"name": "org/model"})
    run = Run(made)
    assert run.base.base_fingerprint == "a" * 16 and run.sampled_from is None
    run.out("generate").write_json({"name": "org/model", "fingerprint": "a" * 16}, "model.json")
    assert Run(made).base.base_fingerprint == "a" * 16
    pipeline._write_manifest(run)
    noted = run.storage.read_json("manifest.json")["inputs"]
    assert noted["fetched model org/model"] == "a" * 16 and noted["model org/model"] == ""
    assert Run(made).keys == Run(made, as_it_was=True).keys == run.keys  # that it is noted moves no key
    hub.move()
    with pytest.raises(DataError, match=r"model\.name='org/model': its fingerprint is b{16} now, and this run began with a{16}"):
        Run(made).base  # noqa: B018
    pinned = job(run_root=str(tmp_path), model={"name": "org/model", "revision": "c0ffee"})
    assert Run(pinned).base.base_fingerprint == "b" * 16


def test_a_folder_whose_weights_change_during_a_run_is_refused(tmp_path, tiny, hub):
    run = Run(job(run_root=str(tmp_path), model={"name": str(tiny)}))
    with pytest.raises(DataError, match=r"its fingerprint is a{16} now, and this run began with " + models.fingerprint(tiny)):
        run.base  # noqa: B018


def test_changes_name_settings_that_came_and_went(tmp_path):
    base = {"run_root": str(tmp_path)}
    run = Run(job(**base, generate={"behaviours": [{"name": "a"}]}))
    assert run.changes() == []
    run.storage.write_bytes(yaml.safe_dump(run.job.model_dump(mode="json")).encode(), "job.yaml")
    assert Run(run.job).changes() == []
    more = Run(job(**base, seed=1, generate={"behaviours": [{"name": "a"}, {"name": "b"}]})).changes()
    assert "seed: 0 -> 1" in more and "generate.behaviours.1: (unset) -> b" in more
    run.storage.write_bytes(b"name: [", "job.yaml")
    assert Run(run.job).previous is None and Run(run.job).state("prompts") == "never ran"


def test_a_stage_that_loses_a_row_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setitem(pipeline._RUNNERS, "prompts", lambda run, progress: StageResult(3, 2))
    made = job(run_root=str(tmp_path))
    with pytest.raises(DataError, match=r"prompts: 3 rows came in, 2 went out.*1 are unaccounted for"):
        pipeline.run(made, ["prompts"])
    assert Run(made).result("prompts") is None


@pytest.mark.parametrize(
    ("wrong", "came", "message"),
    [
        ("score", 8, "score: generate gave 9 rows, 8 came in. Its tables are not what it left"),
        ("score", 10, "score: generate gave 9 rows, 10 came in"),
        ("distill", 7, "distill: score gave 6 rows, 7 came in"),
        ("train", 4, "train: distill gave 5 rows, 4 came in"),
    ],
)
def test_rows_that_are_lost_between_stages_stop_the_run(tmp_path, monkeypatch, wrong, came, message):
    """Nine answers, of which two were cut off and one could not be scored; six scores, of which one makes no example."""
    results = {
        "prompts": StageResult(3, 3),
        "generate": StageResult(10, 9, quarantined={"process_died": 1}),
        "score": StageResult(9, 6, {"truncated": 2}, {"RuntimeError": 1}, facts={"streamed_behind": "generate"}),
        "distill": StageResult(6, 5, {"duplicate": 1}),
        "train": StageResult(5, 5),
    }
    monkeypatch.setattr(pipeline, "start_ray", lambda wanted: None)
    monkeypatch.setattr(pipeline, "_await_fit", lambda job, progress, stage: None)
    for stage, result in results.items():
        monkeypatch.setitem(pipeline._RUNNERS, stage, lambda run, progress, result=result: result)
    made = job(run_root=str(tmp_path / "whole"))
    assert pipeline.run(made, tuple(results)).result("train")["rows_out"] == 5
    dropped = {"x": came - 1}
    monkeypatch.setitem(pipeline._RUNNERS, wrong, lambda run, progress: StageResult(came, 1, dropped))
    broken = job(run_root=str(tmp_path / "broken"))
    with pytest.raises(DataError, match=message):
        pipeline.run(broken, tuple(results))
    assert Run(broken).result(wrong) is None


def test_scores_whose_answers_are_gone_stop_distillation(tmp_path, tiny):
    made = job(run_root=str(tmp_path), model={"name": str(tiny)})
    run = Run(made)
    row = {"behaviour": "b", "logprob_sum": 0.0, "finish_reason": "stop", "weights_version": 0, "prompt_tokens": 1}
    answers = [
        row | {"response_id": f"r{i:02}", "prompt_id": f"p{i % 3}", "text": "x" * (i + 1), "token_ids": [i]} for i in range(12)
    ]
    scores = [{"response_id": a["response_id"], "score_brevity": -float(len(a["text"]))} for a in answers]
    prompts = [
        {"prompt_id": f"p{i}", "messages": [{"role": "user", "content": "q"}], "source": "s", "split": "train"} for i in range(3)
    ]
    run.out("prompts").write_table(from_rows(prompts, schema.PROMPTS), "prompts")
    run.out("generate").write_table(from_rows(answers, schema.RESPONSES), "responses")
    run.out("score").write_table(from_rows(scores, schema.scores(["brevity"])), "scores")
    assert pipeline._distill(run, Silent()).check("distill").rows_in == 12
    run.out("generate").write_table(from_rows(answers[:7], schema.RESPONSES), "responses")
    with pytest.raises(DataError, match=r"distill: 12 rows came in, .*: 5 are unaccounted for"):
        pipeline._distill(run, Silent()).check("distill")


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
    held, enter = [], lease.Lease.__enter__
    monkeypatch.setattr(lease.Lease, "__enter__", lambda self: held.append(self) or enter(self))

    def taken(run, progress):
        theirs = {"id": "x", "machine": "m", "host": "elsewhere", "pid": 7, "renewed": time.time()}
        while held[0]._lost is None:
            run.storage.write_json(theirs, lease.FILE)  # again if a renewal was on its way
            time.sleep(0.1)
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


@pytest.fixture
def large_reward(tmp_path):
    """A reward of 7B parameters by its config: 25 GiB in float32."""
    known = json.loads((Path(models.__file__).parent / "assets" / "models.json").read_text())
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(known["meta-llama/Llama-2-7b-chat-hf"]))
    return {"type": "hf", "model": str(tmp_path / "large"), "attributes": ["brevity"]}


@pytest.mark.parametrize("judge", [False, True])
def test_the_model_of_a_reward_or_judge_counts_before_anything_starts(cluster, large_reward, judge):
    made = job(rewards=[large_reward | {"judge": judge}, *(RAW["rewards"] if judge else [])])
    looks = cluster[1]
    looks[:] = [[Node(8, 0, 16)]]
    phase = "evaluate: judges" if judge else "generate and score"
    with pytest.raises(ClusterError, match=rf"{phase} needs 26\.\d+ GiB of memory, the cluster has 16.* and 26\.1 GiB"):
        pipeline._await_fit(made, Silent(), "generate")
    looks[:] = [[Node(8, 0, 30)]]
    pipeline._await_fit(made, Silent(), "generate")


def test_a_reward_s_model_whose_size_nobody_tells_is_let_pass(cluster, large_reward, monkeypatch):
    asked = []

    def offline(name, revision):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(models, "_settings_there", offline)
    unknown = large_reward | {"model": "org-of-tests/unknown"}
    for stage in ("generate", "score"):
        pipeline._await_fit(job(rewards=[unknown]), Silent(), stage)
    assert asked == ["org-of-tests/unknown"]  # it is slow to find out that a hub is out of reach
    cluster[1][:] = [[Node(8, 0, 16)]]
    both = job(rewards=[unknown | {"attributes": ["charm"]}, large_reward])
    assert set(models.known_reward_parameters(both.rewards)) == {large_reward["model"]}
    assert models.known_reward_parameters(job(rewards=[unknown]).rewards, fetch=False) == {}
    with pytest.raises(ClusterError, match="GiB of memory"):
        pipeline._await_fit(both, Silent(), "generate")


@pytest.mark.parametrize(("kind", "said"), [("L4", r"which has 22\.5"), ("unheard-of", "")])
def test_a_gpu_too_small_for_an_engine_is_refused_where_its_kind_is_known(monkeypatch, kind, said):
    import ray

    shape = Shape(parameters=30 * 10**9, layers=1, hidden=1, linear=1)
    monkeypatch.setattr(models, "resolve", lambda model: None)
    monkeypatch.setattr(models, "shape", lambda folder: shape)
    there = {"CPU": 64.0, "GPU": 8.0, "memory": 1024.0 * 2**30, f"accelerator_type:{kind}": 1.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": there}])
    made = job(generate={"pool": {"gpus": 1}}, train={"gpus_per_worker": 0})
    if said:
        with pytest.raises(ClusterError, match=rf"engine actors that need [\d.]+ GiB of each GPU, {said}.*tensor_parallel=4"):
            pipeline._await_fit(made, Silent(), "generate")
    else:
        pipeline._await_fit(made, Silent(), "generate")


def test_nodes_that_died_hold_nothing(monkeypatch):
    import ray

    there = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8.0 * 2**30, "reward": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [there, there | {"Alive": False}])
    (node,) = pipeline.nodes()
    assert node[:3] == (4.0, 0, 8.0) and "reward" in node.groups and node.gpu_gib == math.inf


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


@pytest.mark.parametrize(
    ("job_config", "expected"),
    [
        (None, "/here:/there"),
        ({"runtime_env": {"env_vars": {"HF_TOKEN": "x"}, "working_dir": "gcs://w.zip"}}, "/here:/there"),
        ({"runtime_env": {"env_vars": {"PYTHONPATH": "/own"}}}, None),  # the same variable twice is an error to Ray
        ({"runtime_env": None}, "/here:/there"),
    ],
)
def test_a_submitted_job_s_own_import_path_stands(monkeypatch, job_config, expected):
    monkeypatch.setattr(pipeline.os, "getcwd", lambda: "/here")
    monkeypatch.setenv("PYTHONPATH", "/there")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if job_config:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job_config))
    assert pipeline._import_path() == ({"PYTHONPATH": expected} if expected else {})


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


def test_what_a_reward_model_reads_redoes_the_scores_and_its_default_is_in_no_key():
    """A run that was scored before rewards had a format goes on."""
    model = {"type": "hf", "model": "org/m", "attributes": ["brevity"]}
    plain, hh = job(rewards=[model]), job(rewards=[model | {"format": "hh"}])
    assert redone(plain, hh) == FROM["score"]
    assert "format" not in pipeline._asked(plain.rewards[0]) and pipeline._asked(hh.rewards[0])["format"] == "hh"


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
