"""A sweep file as jobs: names, settings, what is shared, what fits at the same time."""

from __future__ import annotations

import pickle

import pytest
import yaml
from click.testing import CliRunner

from ctrlray.cli import main
from ctrlray.errors import ConfigError
from ctrlray.placement import Group, Node
from ctrlray.sweep.plan import SHARED, load, slots

JOB = {
    "name": "tiny",
    "control": {"attributes": [{"name": "brevity", "levels": 3}]},
    "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}],
    "train": {"objectives": [{"type": "exmate", "weight": 1.0}], "lora": {"rank": 8, "alpha": 4.0}},
}


def write(folder, **more):
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "s", "job": JOB, "run_root": str(folder / "root")} | more, sort_keys=False))
    return file


def variants(*pairs):
    return [{"name": name, "set": changes} for name, changes in pairs]


ABLATION = variants(
    ("weight", {"train.objectives.0.weight": 5}),
    ("response", {"distill.counterfactual": "response"}),
    ("levels", {"control.attributes.0.levels": 5}),
    ("text", {"control.encoding": "text"}),
    ("whole", {"distill.keep_truncated": True}),
    ("colder", {"generate.sampling.temperature": 0.5}),
)


def test_each_variant_is_a_whole_job_in_a_root_of_its_own(tmp_path):
    plan = load(write(tmp_path, variants=ABLATION, set={"prompts.train": 7}))
    assert list(plan.jobs) == ["base", "weight", "response", "levels", "text", "whole", "colder"]
    weight = plan.jobs["weight"]
    assert (weight.name, weight.run_root) == ("s-weight", f"{tmp_path}/root/variants/weight")
    assert weight.train.objectives[0].weight == 5 and {j.prompts.train for j in plan.jobs.values()} == {7}
    assert plan.jobs["base"].train.objectives[0].weight == 1
    assert plan.changes("weight") == ["train.objectives.0.weight: 1.0 -> 5.0"] and plan.changes("base") == []
    assert pickle.loads(pickle.dumps(plan.jobs)) == plan.jobs


def test_answers_and_scores_are_shared_by_key(tmp_path):
    plan = load(write(tmp_path, variants=ABLATION))
    assert [p.users for p in plan.pools] == [("base", "weight", "response", "levels", "text"), ("whole",), ("colder",)]
    # one folder holds them all: a key tells them apart
    assert {p.job.run_root for p in plan.pools} == {f"{tmp_path}/root/shared"}
    assert plan.pool_of("whole") is plan.pools[1] and plan.pool_of("text") is plan.pools[0]
    keys = {n: r.keys for n, r in plan.runs.items()}
    assert keys["whole"]["generate"] == keys["base"]["generate"] != keys["colder"]["generate"]


def whys(plan, name):
    return {s.stage: s.why for s in plan.stages(name) if s.why != "as the base's"}


def test_a_stage_tells_why_it_differs_from_the_base_s(tmp_path):
    plan = load(write(tmp_path, variants=ABLATION))
    follows = {"evaluate": "follows train", "export": "follows train", "report": "follows evaluate"}
    assert whys(plan, "weight") == {"train": "other settings", **follows}
    assert whys(plan, "response") == {"distill": "other settings", "train": "follows distill", **follows}
    assert set(whys(plan, "levels")) == {"distill", *follows, "train"}
    colder = whys(plan, "colder")
    assert (colder["generate"], colder["score"], "prompts" in colder) == ("other settings", "follows generate", False)
    assert {s.stage for s in plan.stages("weight") if s.shared} == set(SHARED)
    assert {s.why for s in plan.stages("base")} == {"the base"}


def test_what_is_finished_shows_in_shared_and_own_stages(tmp_path):
    plan = load(write(tmp_path, variants=ABLATION))
    shared = plan.storage.sub("shared", "prompts", plan.runs["base"].keys["prompts"])
    shared.write_json({}, "result.json")
    plan.runs["weight"].out("distill").write_json({}, "result.json")
    states = {n: {s.stage: s.state for s in load(tmp_path / "sweep.yaml").stages(n)} for n in ("base", "weight")}
    assert states["base"]["prompts"] == states["weight"]["prompts"] == "finished"
    assert (states["base"]["generate"], states["base"]["distill"]) == ("never ran", "follows score")
    assert states["weight"]["distill"] == "finished"


def test_axes_make_every_combination_and_the_base_only_once(tmp_path):
    axes = {"train.objectives.0.weight": [1.0, 0.05], "distill.counterfactual": ["code", "response"]}
    plan = load(write(tmp_path, axes=axes))
    assert list(plan.jobs) == [
        "base",
        "weight-1.0_counterfactual-response",
        "weight-0.05_counterfactual-code",
        "weight-0.05_counterfactual-response",
    ]
    assert plan.jobs["weight-0.05_counterfactual-response"].distill.counterfactual == "response"


def test_a_named_base_comes_first_and_no_other_is_added(tmp_path):
    plan = load(write(tmp_path, base="text", variants=ABLATION[:4]))
    assert list(plan.jobs) == ["text", "weight", "response", "levels"]
    assert "control.encoding: text -> tokens" in plan.changes("weight")


def test_mappings_merge_and_lists_are_replaced(tmp_path):
    changes = {"train": {"lora": {"rank": 4}, "objectives": [{"type": "clm"}]}}
    job = load(write(tmp_path, variants=variants(("v", changes)))).jobs["v"]
    assert (job.train.lora.rank, job.train.lora.alpha) == (4, 4.0) and [o.type for o in job.train.objectives] == ["clm"]


def test_overrides_reach_the_sweep_and_through_it_every_job(tmp_path):
    plan = load(write(tmp_path, variants=ABLATION, set={"seed": 3}), ["parallel=4", "set.prompts.train=9"])
    assert plan.sweep.parallel == 4
    assert {(j.seed, j.prompts.train) for j in plan.jobs.values()} == {(3, 9)}


def test_a_job_may_be_packaged_or_beside_the_sweep(tmp_path):
    assert load(write(tmp_path, job="smoke")).jobs["base"].prompts.train == 12
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(JOB | {"seed": 5}))
    assert load(write(tmp_path, job="mine.yaml")).jobs["base"].seed == 5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"variants": variants(("v", {"train.epochs": -1}))}, r"variant 'v':\n  train\.epochs: Input should be greater than 0"),
        ({"variants": variants(("v", {"train.epoch": 1}))}, r"variant 'v':\n  train\.epoch: unknown key; did you mean 'epochs'"),
        ({"variants": variants(("v", {"control.attributes.4.levels": 2}))}, r"variant 'v': control\.attributes\.4\.levels: '4'"),
        ({"variants": variants(("v", {"run_root": "/x"}))}, r"variant 'v'.*run_root is given by the sweep itself"),
        ({"set": {"name": "x"}}, r"variant 'base': set\.name is given by the sweep itself"),
        ({"variants": variants(("v", {"seed": 1}), ("v", {"seed": 2}))}, r"variant 'v' is there twice"),
        ({"variants": variants(("v", {"seed": 0}))}, r"variant 'v' is the same job as 'base'; drop one"),
        ({"axes": {"train.epochs": [1, 0]}}, r"variant 'epochs-0':\n  train\.epochs"),
        ({"axes": {"train.epochs": []}}, r"axes\.train\.epochs"),
        ({"run_root": "here"}, "run_root='here' is relative"),
        ({"job": "nowhere"}, "no job file at 'nowhere'"),
        ({"paralel": 2}, "paralel: unknown key; did you mean 'parallel'"),
        ({"variants": [{"name": "a/b"}]}, r"variants\.0\.name"),
        ({"variants": [{"name": "a", "sets": {}}]}, r"variants\.0\.sets: unknown key; did you mean 'set'"),
    ],
)
def test_errors_name_the_variant_and_the_field(tmp_path, more, said):
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path, **more))


def test_dry_run_says_what_each_variant_shares_and_does(tmp_path):
    made = CliRunner().invoke(main, ["sweep", str(write(tmp_path, variants=ABLATION)), "--dry-run"])
    assert made.exit_code == 0 and "shared by base, weight, response, levels, text: at most" in made.output
    block = made.output.split("\nresponse:")[1].split("\n\n")[0]
    assert "    distill.counterfactual: code -> response\n" in block
    assert "    shared    prompts, generate, score: as the base's\n" in block
    assert block.endswith("    own       distill: other settings; train, evaluate, export, report: new input")
    assert not (tmp_path / "root").exists()


def test_wrong_sweep_files_end_with_the_exit_code_of_a_setting(tmp_path):
    made = CliRunner().invoke(main, ["sweep", str(write(tmp_path, base="b/c"))])
    assert made.exit_code == 2 and "error: " in made.output


def group(cpus, gpus=0.0, actors=1):
    return Group("phase", "operator", actors, cpus, gpus, 0.0)


TRAIN, ENGINE = [group(1.0)], [group(0.5), group(0.25)]


@pytest.mark.parametrize(
    ("phases", "nodes", "most", "expected"),
    [
        ([TRAIN, ENGINE], [Node(1, 0, 64)], 8, 1),
        ([TRAIN, ENGINE], [Node(2, 0, 64)], 8, 2),
        ([TRAIN, ENGINE], [Node(9, 0, 64)], 4, 4),
        # each phase fits twice, one of each does not: they need two GPUs and three CPUs on one node
        ([[group(1.0, 1.0)], [group(2.0)]], [Node(2, 1, 64)], 2, 1),
        ([[group(2.0, actors=2)]], [Node(3, 0, 64), Node(3, 0, 64)], 3, 1),  # their sum would do, no node has room
        ([[group(4.0)]], [Node(2, 0, 64)], 3, 1),  # does not fit at all: the job itself says so
    ],
)
def test_as_many_at_once_as_fit_in_any_phase(phases, nodes, most, expected):
    assert slots(phases, nodes, most) == expected


def test_jobs_in_different_phases_count_together():
    # two that train: 2 CPUs and no GPU; two that sample: 2 GPUs; one of each: 1 CPU, 1 GPU. Only the second does not fit.
    assert slots([[group(1.0)], [group(0.1, 1.0)]], [Node(4, 1, 64)], 2) == 1
    assert slots([[group(1.0)], [group(0.1, 1.0)]], [Node(4, 2, 64)], 3) == 2
