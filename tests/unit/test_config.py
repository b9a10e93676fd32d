from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ctrlray import config
from ctrlray.cli import main
from ctrlray.errors import ConfigError
from ctrlray.estimate import estimate

ROOT = Path(__file__).parents[2]
CONTROL = {"attributes": [{"name": "brevity", "levels": 3}]}
JUDGE = {"type": "judge", "url": "http://h/v1", "model": "m", "attribute": "brevity", "rubric": "r"}
SET = {"name": "x", "sources": [{"type": "packaged"}]}
REWARD = [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}]


def job(**extra):
    return config.parse(config.Job, {"name": "t", "control": CONTROL, "rewards": REWARD, **extra}, where="test")


@pytest.mark.parametrize("path", sorted(ROOT.glob("jobs/*/job.yaml")), ids=lambda p: p.parent.name)
def test_every_job_file_loads(path):
    raw = yaml.safe_load(path.read_text())
    if "control" in raw:
        assert config.load_job(path).name
    else:
        from ctrlray.rewards.job import RewardTrainJob

        assert config.parse(RewardTrainJob, raw, where=str(path))


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"train.epoch: unknown key; did you mean 'epochs'"):
        config.load_job("smoke", ["train.epoch=3"])
    with pytest.raises(ConfigError, match=r"did you mean 'weight'"):
        config.load_job("smoke", ["train.objectives=[{type: exmate, wieght: 2}]"])


def test_set_overrides_with_yaml_values():
    loaded = config.load_job("smoke", ["train.lora.rank=4", "evaluate.methods=[start]", "generate.behaviours.0.name=zero"])
    assert loaded.train.lora.rank == 4 and loaded.evaluate.methods == ("start",)
    assert loaded.generate.behaviours[0].name == "zero"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.objectives=[{type: exmate", r"--set train\.objectives: '\[\{type: exmate' is not YAML.*quote or close it"),
        ("generate.behaviours.9.name=x", r"--set generate\.behaviours\.9\.name: '9' is no place in a list of 2"),
        ("generate.behaviours.2={name: x}", r"--set generate\.behaviours\.2: '2' is no place in a list of 2"),
        ("generate.behaviours.plain.name=x", "'plain' is no place in a list of 2"),
        ("seed", "--set 'seed': write it as a.b=value"),
    ],
)
def test_a_setting_that_cannot_be_set_is_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        config.load_job("smoke", [assignment])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("evaluate.methods.0.x=1", r"--set evaluate\.methods\.0\.x: evaluate\.methods\.0 is not a mapping; set it as a whole"),
        ("evaluate.methods.0.x.y=1", r"--set evaluate\.methods\.0\.x\.y: 'x' lies under a value that is not a mapping"),
    ],
)
def test_nothing_is_set_below_a_plain_value_in_a_list(assignment, message):
    with pytest.raises(ConfigError, match=message):
        config.load_job("smoke", ["evaluate.methods=[start]", assignment])


def ppo(**settings):
    return {"train": {"objectives": [{"type": "ppo", **settings}]}}


def test_ppo_with_a_critic_may_have_groups_of_one():
    (objective,) = job(**ppo(advantage="gae", group_size=1)).train.objectives
    assert objective.rollouts_per_step == 16


@pytest.mark.parametrize(
    ("engine", "worker", "asked", "how"),
    [
        (0, 0, "auto", "file"),
        (1, 0, "auto", "file"),
        (0.5, 1, "auto", "file"),
        (1, 0.5, "auto", "file"),
        (1, 1, "auto", "nccl"),
        (2, 1, "nccl", "nccl"),
        (1, 1, "file", "file"),
    ],
)
def test_weights_go_over_nccl_where_engines_and_workers_have_whole_gpus(engine, worker, asked, how):
    made = job(generate={"pool": {"gpus": engine}}, train=ppo(transfer=asked)["train"] | {"gpus_per_worker": worker})
    assert made.transfer(made.train.objectives[0]) == how


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"control": {"attributes": [{"name": "brevity", "levels": 1}]}}, "levels"),
        ({"control": {"attributes": [{"name": "brevity", "levels": 11}]}}, "levels"),
        ({"control": {"attributes": []}}, "attributes"),
        ({"control": {"attributes": [{"name": "charm"}]}}, "no reward gives 'charm'"),
        ({"control": {"attributes": [{"name": "messages"}]}}, "chat template variable"),
        ({"run_root": "relative/path"}, "is relative"),
        ({"export": {"levels": {"brevity": [2, 9]}}}, "must lie in 1..3"),
        ({"export": {"defaults": {"other": 1}}}, "unknown attribute"),
        ({"export": {"objective": "clm"}}, "is not trained"),
        ({"evaluate": {"levels": [[1, 4]]}}, "must lie in 1..3"),
        ({"train": {"zero_stage": 4}}, "zero_stage"),
        ({"generate": {"pool": {"min_size": 3, "max_size": 2}}}, "raise max_size"),
        ({"control": {"attributes": [{"name": "brevity"}] * 2}}, "attribute names must differ"),
        ({"control": {"attributes": [{"name": "role"}]}}, "'role' is a chat template variable"),
        ({"generate": {"behaviours": [{"name": "a"}, {"name": "a"}]}}, "behaviour names must differ"),
        ({"generate": {"behaviours": [{"name": "a", "max_tokens": 65}]}}, "max_tokens=65 of 'a' is above sampling.max_tokens=64"),
        ({"rewards": [{**JUDGE, "lowest": 10, "highest": 10}]}, "lowest=10.0 must be below highest=10.0"),
        ({"train": {"offload": "all", "zero_stage": 2, "gpus_per_worker": 1}}, "needs zero_stage 3 or more, got 2"),
        ({"train": {"offload": "optimizer", "zero_stage": 1}}, "set gpus_per_worker, or offload to none"),
        ({"train": {"objectives": [{"type": "clm"}, {"type": "clm"}]}}, "each type at most once"),
        (ppo(start="exmate"), "ppo starts from 'exmate', which must stand before it"),
        (ppo(sampling={"temperature": 0}), "temperature=0, .* does not sample the policy itself"),
        (ppo(sampling={"min_p": 0.1}), "min_p=0.1, .*set temperature above 0, top_p: 1, min_p: 0"),
        (ppo(sampling={"min_p": 0, "finish": "sentence"}), "finish=sentence does not"),
        (ppo(group_size=1), "group_size=1 leaves rloo nothing to compare"),
        (ppo(settings_per_prompt=4), "settings_per_prompt=4, the grid has 3 cells"),
        (ppo(prompts_per_step=97), "prompts_per_step=97 is more than prompts.train=96"),
        (ppo(kl={"target": 5, "horizon": 12}), "kl.horizon=12 is too short for 64 rollouts a step.*set 13 or more"),
        (ppo(weights={"charm": 1}), "ppo names 'charm', which is no attribute"),
        (ppo(chances={"brevity": [1, 1]}), r"ppo.chances.brevity=\[1.0, 1.0\] needs a number for each of 3 levels"),
        (ppo(chances={"brevity": [0, 0, 0]}), "at least one above 0"),
        (ppo(transfer="nccl"), r"ppo.transfer=nccl needs whole GPUs .*pool.gpus=0 and .*; raise them to 1, or set auto"),
        ({"export": {"levels": {"brevity": [3, 2]}}}, "brevity=3..2 must lie in 1..3"),
        ({"export": {"levels": {"brevity": [1, 2]}, "defaults": {"brevity": 3}}}, "defaults.brevity=3 must lie in 1..2"),
        ({"evaluate": {"levels": [[1], [2]]}}, r"one list per attribute \(1\)"),
        ({"evaluate": {"levels": [[0, 1]]}}, "must lie in 1..3"),
        ({"evaluate": {"levels": [[]]}}, "must lie in 1..3"),
        ({"rewards": REWARD * 2}, "rewards: 'brevity' is given twice.*its own name"),
        ({"rewards": [REWARD[0] | {"judge": True}]}, "all of them are judges.*add one without"),
        ({"rewards": REWARD + [REWARD[0] | {"judge": True}] * 2}, "'brevity' is given twice by a judge"),
        (
            {"rewards": [*REWARD, {"type": "tfidf", "judge": True}]},
            "no judge gives 'brevity' for 'brevity'; judges give .*'helpfulness'.*; name its outputs like",
        ),
        ({"evaluate": {"sets": [SET | {"role": "over_refusal"}]}}, "role=over_refusal, attribute=None: .* needs `attribute`"),
        ({"evaluate": {"sets": [SET | {"attribute": "brevity"}]}}, "role=ood, attribute='brevity': ood takes none"),
        (
            {"evaluate": {"sets": [SET | {"role": "over_refusal", "attribute": "charm"}]}},
            r"evaluate.sets.x.attribute='charm' is no attribute of the control space, which has \['brevity'\]",
        ),
        ({"evaluate": {"sets": [SET, SET]}}, r"names of sets must differ, got \['x', 'x'\]"),
        ({"train": {"learning_rate": math.inf}}, "learning_rate: .* finite"),
        ({"train": {"epochs": math.inf}}, "epochs: .* finite"),
    ],
)
def test_bad_settings_name_the_field(extra, message):
    with pytest.raises(ConfigError, match=message):
        job(**extra)


def test_job_is_frozen_and_picklable():
    made = job()
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(ValueError):
        made.name = "other"


def test_estimate_by_hand():
    rows = {r.stage: r for r in estimate(config.load_job("smoke"))}
    assert rows["generate"].rows == 12 * 4 and rows["generate"].tokens == 48 * 32
    assert rows["evaluate"].rows == 4 * 4 * 3  # prompts x cells x (start, prompting, exmate)


def test_estimate_counts_the_prompts_of_sets():
    benchmarks = [{"type": "benchmark", "name": "mt_bench"}, {"type": "benchmark", "name": "xstest", "limit": 9}]
    sets = [{"name": "a", "sources": benchmarks}, {"name": "b", "sources": benchmarks, "limit": 50}]
    made = config.load_job("smoke", [f"evaluate.sets={yaml.safe_dump(sets, default_flow_style=True)}"])
    rows = {r.stage: r for r in estimate(made)}
    assert rows["evaluate"].rows == (4 + 89 + 50) * 4 * 3


def test_cli_prints_one_readable_error():
    result = CliRunner().invoke(main, ["pipeline", "no-such-job"])
    assert result.exit_code == 2 and "no job file at 'no-such-job'" in result.output
    result = CliRunner().invoke(main, ["pipeline", "smoke", "--dry-run", "--set", "train.epochs=-1"])
    assert result.exit_code == 2 and "train.epochs" in result.output and "Traceback" not in result.output


def test_export_levels_become_settings():
    result = CliRunner().invoke(main, ["export", "smoke", "--dry-run", "--levels", "safety=2..2"])
    assert result.exit_code == 0 and "safety:\n    - 2\n    - 2" in result.output
    assert CliRunner().invoke(main, ["export", "smoke", "--dry-run", "--levels", "safety=2-3"]).exit_code == 2
    result = CliRunner().invoke(main, ["export", "smoke", "--dry-run", "--levels", "safety=1..3"])
    assert result.exit_code == 2 and "must lie in 1..2" in result.output


def test_dry_run_starts_nothing(tmp_path):
    root = tmp_path / "run"
    result = CliRunner().invoke(main, ["pipeline", "smoke", "--dry-run", "--set", f"run_root={root}"])
    assert result.exit_code == 0 and "tokens at most" in result.output
    assert not root.exists()


@pytest.mark.parametrize("verb", ["prompts", "generate", "score", "distill", "train", "evaluate", "export", "report", "pipeline"])
def test_help_has_examples(verb):
    result = CliRunner().invoke(main, [verb, "--help"])
    assert result.exit_code == 0 and f"ctrlray {verb}" in result.output.split("Examples:")[1]


@pytest.mark.parametrize(
    ("module", "may_load"),
    [
        ("ctrlray.cli", set()),
        ("ctrlray.pipeline", set()),
        ("ctrlray.objectives.losses", {"torch"}),
        ("ctrlray.objectives.ppo", {"torch"}),
    ],
)
def test_import_is_light(module, may_load):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"torch", "ray", "vllm", "deepspeed", "transformers"} & set(loaded) <= may_load


def test_an_attribute_can_add_up_several_outputs():
    raw = {
        "name": "t",
        "control": {"attributes": [{"name": "kind", "levels": 2, "score": {"warm": 0.75, "curt": -0.25}}]},
        "rewards": [{"type": "function", "target": "m:f", "attributes": ["warm", "curt"]}],
    }
    assert config.parse(config.Job, raw, where="test").control.attributes[0].sources == {"warm": 0.75, "curt": -0.25}
    raw["rewards"][0]["attributes"] = ["warm"]
    with pytest.raises(ConfigError, match="no reward gives 'curt'"):
        config.parse(config.Job, raw, where="test")


def test_judges_stand_apart_from_what_trains():
    made = job(rewards=[REWARD[0] | {"judge": True, "target": "m:g"}, *REWARD])
    assert [r.target for r in made.teachers] == ["tests.fakes:length_reward"] and [r.target for r in made.judges] == ["m:g"]
    assert job().judges == ()


def test_heads_files_may_give_outputs_that_the_job_cannot_know():
    raw = {"control": {"attributes": [{"name": "charm"}]}, "rewards": [{"type": "embedded", "heads": "/my.safetensors"}]}
    assert job(**raw).rewards[0].outputs is None


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"- a\n", "is a mapping of settings, got list"), (b"\xff\xfe\x00", "cannot read"), (b"a: [", "cannot read")],
)
def test_job_files_that_are_no_jobs_are_named(tmp_path, content, said):
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        config.load_job(file)
    assert str(file) in str(caught.value)


def test_run_roots(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert job(run_root="~/run").root == "/home/me/run" and job(run_root="s3://bucket/~x").root == "s3://bucket/~x"


def test_a_wrong_value_is_shown_but_not_at_any_length():
    with pytest.raises(ConfigError, match=r'samples: .* \(got "x{50,119}\)') as caught:
        job(generate={"samples": "x" * 10_000})
    assert len(str(caught.value)) < 400


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: t\ncontrol: {attributes: [{name: a}]}\ntrain:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(ConfigError, match="'epochs' is given twice"):
        config.load_job(path)


@pytest.mark.parametrize("kind", ["http", "judge"])
def test_a_reward_s_address_holds_no_credentials(kind):
    raw = {"type": kind, "url": "https://me:secret@host/v1", "attributes": ["a"]}
    job = {"name": "t", "control": {"attributes": [{"name": "a"}]}, "rewards": [raw]}
    with pytest.raises(ConfigError, match="token_env"):
        config.parse(config.Job, job, where="t")
