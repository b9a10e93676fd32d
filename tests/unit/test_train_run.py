"""What one training may resume: the name under which Ray Train keeps snapshots holds all that the loop reads."""

from __future__ import annotations

import pytest

from ctrlray import config, models, schema
from ctrlray.errors import DataError
from ctrlray.ledger import Silent
from ctrlray.pipeline import Run
from ctrlray.tables import Storage, from_rows
from ctrlray.train import run as train

RAW = {
    "name": "t",
    "control": {"attributes": [{"name": "brevity", "levels": 2}]},
    "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity"]}],
}


@pytest.fixture
def trained(tmp_path, tiny, monkeypatch):
    """The result of a training on some examples, and the names under which its objectives were launched."""

    def run(settings, seen=(2,), number=2):
        names, counts = [], list(seen)

        def launch(loop, given, settings, name, out, *, what):
            names.append(name)
            run.seeds.append(given["task"].seed)
            place = given["task"].out
            place.write_json([{"step": 1, "tokens": 1, "seconds": 1.0}], "curves.json")
            place.write_json({"path": "segments", "examples": counts.pop(0)}, "done.json")

        monkeypatch.setattr(train, "launch", launch)
        job = config.parse(config.Job, RAW | {"model": {"name": str(tiny)}, "train": settings}, where="t")
        example = {
            "prompt_id": "p",
            "messages": [{"role": "user", "content": "q"}],
            "text": "a",
            "token_ids": [1],
            "level_brevity": 1,
            "counterfactuals": [],
            "weight": 1.0,
        }
        columns = schema.examples(["brevity"])
        rows = [example | {"example_id": f"e{i}", "split": "train" if i else "valid"} for i in range(number)]
        table = from_rows([{k: row.get(k) for k in columns.names} for row in rows], columns)
        out = Storage(str(tmp_path / str(len(list(tmp_path.iterdir())))))
        base = models.PreparedBase.__new__(models.PreparedBase)
        return train.run(table, out, job, base, None, out, Run(job).keys["train"], Silent()), names

    run.seeds = []
    return run


@pytest.fixture
def name_of(trained):
    """The name of the training that a job starts."""

    def find(**settings):
        return trained(settings)[1][0]

    find.seeds = trained.seeds
    return find


TWO = {"objectives": [{"type": "clm"}, {"type": "exmate"}]}


def test_examples_are_accounted_for_as_workers_saw_them(trained):
    result, _ = trained(TWO, seen=(3, 3), number=3)
    result.check("train")
    assert (result.rows_in, result.rows_out) == (3, 3) and result.facts["clm"]["examples"] == 3


@pytest.mark.parametrize(("seen", "lost"), [((3, 2), 1), ((1, 3), 2), ((3, 4), -1)])
def test_examples_that_a_worker_did_not_see_stop_the_stage(trained, seen, lost):
    result, _ = trained(TWO, seen=seen, number=3)
    with pytest.raises(DataError, match=f"train: 3 rows came in, .*: {lost} are unaccounted for"):
        result.check("train")


def test_another_seed_of_training_alone_trains_anew(name_of):
    names = [name_of(), name_of(seed=0), name_of(seed=5)]
    assert name_of.seeds == [0, 0, 5] and len(set(names)) == 3
    runs = [Run(config.load_job("smoke", [f"train.seed={seed}"])) for seed in (1, 2)]
    first, second = (run.keys for run in runs)
    assert [s for s in first if first[s] == second[s]] == ["prompts", "generate", "score", "distill"]


def test_a_changed_objective_never_resumes_an_old_snapshot(name_of):
    weights = [name_of(objectives=[{"type": "exmate", "weight": w}]) for w in (1.0, 2.0)]
    clm = name_of(objectives=[{"type": "clm"}])
    other_rate = name_of(objectives=[{"type": "clm"}], learning_rate=1e-3)
    assert len({*weights, clm, other_rate}) == 4


def test_more_failures_allowed_or_less_memory_resume_it(name_of):
    assert name_of() == name_of(max_failures=3, cpus_per_worker=0.5, activation_checkpointing=True)
