from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
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


def job_files():
    """Every job file of the repository with the kind of job that it is."""
    from ctrlray.rewards.job import RewardTrainJob

    found = sorted([*ROOT.glob("jobs/*/*.yaml"), *(ROOT / "ctrlray" / "assets" / "jobs").glob("*.yaml")])
    jobs = [p for p in found if p.name != "sweep.yaml"]
    return [(p, config.Job if "control" in yaml.safe_load(p.read_text()) else RewardTrainJob) for p in jobs]


@pytest.mark.parametrize(("path", "kind"), job_files(), ids=lambda v: f"{v.parent.name}-{v.stem}" if isinstance(v, Path) else "")
def test_every_job_file_fits_the_schema_for_editors(path, kind):
    made = CliRunner().invoke(main, ["config", "schema"]).output if kind is config.Job else json.dumps(kind.model_json_schema())
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(made), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": 7}, "7 is not of type 'string'"),
        ({"seed": "x"}, "'x' is not of type 'integer'"),
        ({"seeed": 1}, "'seeed' was unexpected"),
        ({"train": {"epochs": True}}, "True is not of type 'number'"),
        ({"train": {"epochs": 0}}, "0 is less than or equal to the minimum of 0"),
        ({"control": {"attributes": []}}, "[] should be non-empty"),
    ],
)
def test_the_schema_for_editors_refuses_what_the_job_does(changed, told):
    raw = {"name": "t", "control": CONTROL, "rewards": REWARD}
    schema = json.loads(CliRunner().invoke(main, ["config", "schema"]).output)
    jsonschema.validate(raw, schema)
    with pytest.raises(jsonschema.ValidationError, match=re.escape(told)):
        jsonschema.validate(raw | changed, schema)
    with pytest.raises(ConfigError):
        job(**changed)


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


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("generate.samples=true", "generate.samples: Input should be a number, not true or false (got true)"),
        ("train.zero_stage=true", "train.zero_stage: Input should be a number, not true or false (got true)"),
        ("model.trust_remote_code=1", "model.trust_remote_code: Input should be true or false, not a number (got 1)"),
        ("model.trust_remote_code=0.0", "model.trust_remote_code: Input should be true or false, not a number (got 0.0)"),
        ("evaluate.levels=[[1, true], [1]]", "evaluate.levels.0.1: Input should be a number, not true or false (got true)"),
        ("control.attributes.0.score={a: true}", "control.attributes.0.score.a: Input should be a number, not true or false"),
        ("train.objectives=[{type: ppo, max_staleness: false}]", "train.objectives.0.max_staleness: Input should be a number"),
    ],
)
def test_true_is_no_number_and_1_is_not_true(assignment, said):
    with pytest.raises(ConfigError) as caught:
        config.load_job("quickstart", [assignment])
    assert str(caught.value).splitlines()[1].startswith(f"  {said}") and len(str(caught.value).splitlines()) == 2


def test_other_spellings_of_numbers_and_bools_stay():
    words = ["train.learning_rate=1e-3", "train.epochs=1", "generate.samples='3'", "seed=3.0", "model.trust_remote_code='yes'"]
    made = config.load_job("quickstart", [*words, "model.template_variables={a: true, b: 1, c: '1'}"])
    assert made.train.learning_rate == 1e-3 and made.train.epochs == 1.0 and isinstance(made.train.epochs, float)
    assert made.generate.samples == 3 and made.seed == 3 and isinstance(made.seed, int) and made.model.trust_remote_code is True
    assert [repr(v) for v in made.model.template_variables.values()] == ["True", "1", "'1'"]


def test_a_setting_is_named_as_the_file_spells_it():
    judge = JUDGE | {"retries": "x", "judge": "x"}  # `judge` is the kind, and a setting too
    with pytest.raises(ConfigError) as caught:
        job(rewards=[*REWARD, {**REWARD[0], "type": "funtion"}, {"type": "http", "url": "http://h"}, judge])
    assert [line.split(" (got")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  rewards.1.type: Input should be one of 'embedded', 'tfidf', 'hf', 'function', 'http', 'judge'",
        "  rewards.2.attributes: Field required",
        "  rewards.3.judge: Input should be a valid boolean, unable to interpret input",
        "  rewards.3.retries: Input should be a valid integer, unable to parse string as an integer",
    ]


def test_job_is_frozen_and_picklable():
    made = job()
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(ValueError):
        made.name = "other"


def test_estimate_by_hand():
    rows = {r.stage: r for r in estimate(config.load_job("smoke"))}
    assert rows["generate"].rows == 12 * 4 and rows["generate"].tokens == 48 * 32
    assert rows["evaluate"].rows == 4 * (4 * 2 + 1)  # prompts x (cells x (prompting, exmate) + start, which has none)


def test_estimate_counts_candidates_once_for_all_cells_and_as_long_as_generation_s():
    more = ["evaluate.methods=[start, reranking]", "evaluate.candidates=5", "evaluate.samples=2"]
    rows = {r.stage: r for r in estimate(config.load_job("smoke", [*more, "evaluate.sampling.max_tokens=20"]))}
    assert rows["evaluate"].rows == 4 * (2 * (4 + 1) + 5)
    assert rows["evaluate"].tokens == 4 * (2 * (4 + 1) * 20 + 5 * 32)


def test_estimate_counts_the_prompts_of_sets():
    benchmarks = [{"type": "benchmark", "name": "mt_bench"}, {"type": "benchmark", "name": "xstest", "limit": 9}]
    sets = [{"name": "a", "sources": benchmarks}, {"name": "b", "sources": benchmarks, "limit": 50}]
    made = config.load_job("smoke", [f"evaluate.sets={yaml.safe_dump(sets, default_flow_style=True)}"])
    rows = {r.stage: r for r in estimate(made)}
    assert rows["evaluate"].rows == (4 + 89 + 50) * (4 * 2 + 1)


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


def verbs(group=main, words=()):
    """Every command and group with the words that call it."""
    found = [(words, group)]
    for name, command in group.commands.items():
        below = (*words, name)
        found += verbs(command, below) if isinstance(command, click.Group) else [] if command.hidden else [(below, command)]
    return found


@pytest.mark.parametrize(("words", "command"), verbs(), ids=lambda v: " ".join(v) or "ctrlray" if isinstance(v, tuple) else "")
def test_help_has_examples(words, command):
    result = CliRunner().invoke(main, [*words, "--help"])
    lines = result.output.partition("Examples:\n")[2].splitlines()
    called = [line for line in lines if " ".join(["ctrlray", *(w for w in words if w != "run")]) in line]
    assert result.exit_code == 0 and called and result.output.startswith("Usage: ") and command.help
    known = {option for p in command.params for option in p.opts}
    if not isinstance(command, click.Group):
        assert {w for line in called for w in line.split() if w.startswith("--")} <= known


def test_the_walk_finds_every_verb():
    found = {" ".join(words) for words, _ in verbs()}
    assert {"", "pipeline", "runs", "runs cost", "serve run", "annotate import", "config schema", "completion"} <= found
    assert len(found) > 30 and "part" not in found


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pip", {"plain,pipeline"}),
        ("pipeline smo", {"plain,smoke"}),
        ("pipeline smoke --set train.ep", {"plain,train.epochs="}),
        ("runs s", {"plain,show"}),
        ("runs show smo", {"plain,smoke-of-mine"}),
        ("completion ", {"plain,bash", "plain,zsh", "plain,fish"}),
    ],
)
def test_a_shell_completes_verbs_jobs_settings_and_runs(typed, offered, tmp_path):
    """As the script of `ctrlray completion bash` calls it, in a process of its own."""
    run = tmp_path / "ctrlray" / "runs" / "smoke-of-mine"
    run.mkdir(parents=True)
    (run / "job.yaml").write_text("name: smoke\n")
    words = ["ctrlray", *typed.split(" ")]
    asked = {"_CTRLRAY_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    asked["XDG_DATA_HOME"] = str(tmp_path)
    program = [sys.executable, "-m", "ctrlray"]
    said = subprocess.check_output(program, env={**os.environ, **asked}, cwd=ROOT, text=True, timeout=120)
    assert offered <= set(said.split())


def test_the_completion_script_asks_for_it_that_way():
    script = CliRunner().invoke(main, ["completion", "bash"]).output
    assert "COMP_WORDS" in script and "_CTRLRAY_COMPLETE=bash_complete" in script and "complete -o nosort -F" in script


@pytest.mark.parametrize(
    ("module", "may_load"),
    [
        ("ctrlray.cli", set()),
        ("ctrlray.pipeline", {"pyarrow", "numpy", "pandas"}),
        ("ctrlray.objectives.losses", {"torch", "numpy"}),
        ("ctrlray.objectives.ppo", {"torch", "numpy"}),
    ],
)
def test_import_is_light(module, may_load):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    heavy = {"torch", "ray", "vllm", "deepspeed", "transformers"}
    heavy |= {"pyarrow", "numpy", "scipy", "pandas", "datasets", "httpx", "plotly", "fastapi"}
    assert heavy & set(loaded) <= may_load


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


@pytest.mark.parametrize("value", ["{{ seed }}", "2024-99-99", "!!int ''", '"\\UFFFFFFFF"', "[" * 3000])
def test_values_that_no_yaml_can_be_are_named_and_no_traceback(tmp_path, value):
    path = tmp_path / "job.yaml"
    path.write_text(f"name: t\nseed: {value}\n")
    with pytest.raises(ConfigError, match="cannot read the job file"):
        config.load_job(path)
    with pytest.raises(ConfigError, match="--set seed: "):
        config.load_job("quickstart", [f"seed={value}"])


@pytest.mark.parametrize("kind", ["http", "judge"])
def test_a_reward_s_address_holds_no_credentials(kind):
    raw = {"type": kind, "url": "https://me:secret@host/v1", "attributes": ["a"]}
    job = {"name": "t", "control": {"attributes": [{"name": "a"}]}, "rewards": [raw]}
    with pytest.raises(ConfigError, match="token_env"):
        config.parse(config.Job, job, where="t")


ONE = {
    "name": "t",
    "control": {"attributes": [{"name": "a"}]},
    "rewards": [{"type": "function", "target": "m:f", "attributes": ["a"]}],
}


@pytest.mark.parametrize(
    "before, after, told",
    [
        ({}, {}, []),
        ({}, {"seed": 1}, ["seed: 0 -> 1"]),
        ({}, {"train": {"seed": 3}}, ["train.seed: None -> 3"]),
        (
            {"evaluate": {"methods": ["start", "prompting"]}},
            {"evaluate": {"methods": []}},
            ["evaluate.methods: [start, prompting] -> []"],
        ),
        (
            {"train": {"objectives": [{"type": "clm"}, {"type": "exmate"}]}},
            {"train": {"objectives": [{"type": "clm"}]}},
            ["train.objectives.1: exmate -> (unset)"],
        ),
        (
            {"train": {"objectives": [{"type": "clm"}]}},
            {"train": {"objectives": [{"type": "exmate", "weight": 9}]}},
            ["train.objectives.0: clm -> exmate"],
        ),
        (
            {"train": {"objectives": [{"type": "exmate"}]}},
            {"train": {"objectives": [{"type": "exmate", "weight": 9}]}},
            ["train.objectives.0.weight: 1.0 -> 9.0"],
        ),
    ],
)
def test_differences_between_jobs_in_few_words(before, after, told):
    old, new = (config.parse(config.Job, ONE | changes, where="t") for changes in (before, after))
    assert config.differences(old, new) == told
