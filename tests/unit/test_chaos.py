"""The pure parts of the chaos trials: which process dies when, what simulated engines answer, how runs are compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.chaos import compare, core, page, trial
from benchmarks.chaos.compare import Difference, differ
from benchmarks.chaos.driver import _simulated
from benchmarks.chaos.job import BLOCKS, METHODS, job
from benchmarks.chaos.nodes import GROUP
from benchmarks.chaos.plan import CHILD, DRIVER, ENGINE, KINDS, REWARD, Where, plan
from benchmarks.chaos.scene import Scene
from benchmarks.chaos.simulated import SimulatedSpec
from ctrlray import config, models, placement
from ctrlray.engine.engine import EngineSpec
from ctrlray.pipeline import STAGES, Run
from ctrlray.stages.questions import methods
from ctrlray.tables import Storage
from ctrlray.train.ppo.rollouts import part
from tests.fakes import tiny_model

ROOT = Path(__file__).parent.parent.parent


def test_fifty_trials_kill_each_kind_five_times_in_all_its_places():
    trials = [plan(number) for number in range(50)]
    assert Counter(t.kind for t in trials) == dict.fromkeys(KINDS, 5)
    for kind, (victim, places) in KINDS.items():
        mine = [t for t in trials if t.kind == kind]
        assert {t.where for t in mine} == set(places) and {t.victim for t in mine} == {victim}
        assert len({t.share for t in mine}) == 5  # at moments of their own
    assert [plan(number) for number in range(50)] == trials
    assert all(t.where.stage in t.where.stages and "export" not in t.where.stages for t in trials)


def test_a_victim_that_was_missed_is_looked_for_earlier():
    first = plan(7)
    assert first.earlier(0) == first and first.earlier(1).share == first.share / 2 and first.earlier(2).delay_s == 0


def test_a_simulated_answer_follows_from_request_and_weights_alone():
    said = core.answer([1, 2, 3], 16, "w")
    assert core.answer([1, 2, 3], 16, "w") == said
    assert len({str(core.answer([1, 2, i], 16, "w")) for i in range(50)}) > 40
    assert len({str(core.answer([1, 2, 3], 16, str(i))) for i in range(50)}) > 40
    for i in range(100):
        text, reason, logprobs = core.answer([i], 5, "w")
        assert 1 <= len(text) <= 5 and reason == ("stop" if len(text) < 5 else "length")
        assert len(logprobs) == len(text) + (reason == "stop") and max(logprobs) < 0
    assert {core.answer([i], 5, "w")[1] for i in range(100)} == {"stop", "length"}


def test_engines_of_a_job_are_never_simulated_but_by_the_driver_of_a_trial(tiny, private_cache, tmp_path):
    run = Run(config.parse(config.Job, job(tiny, tmp_path, "exmate"), where="t"))
    real, simulated = run.engine_spec(), _simulated(run)
    assert type(real) is EngineSpec and type(simulated) is SimulatedSpec
    assert vars(real) == vars(simulated)


def test_a_simulated_engine_answers_by_its_weights_and_ends_with_its_child(tiny, tmp_path):
    spec = SimulatedSpec(str(tiny), "float32", 64, config.EngineSettings())
    engine, prompts, sampling = spec.build(), [[1, 2, 3], [4]], config.Sampling(max_tokens=6)

    def texts():
        return [samples[0].text for samples in engine.generate(prompts, sampling)]

    (first,), (second,) = engine.generate(prompts, sampling)
    assert engine.decode(first.token_ids).startswith(first.text) and first != second
    assert len(first.logprobs) == len(first.token_ids) <= 6 and first.logprob_sum == sum(first.logprobs)
    assert engine.logp(prompts, [[5, 6], []])[1] == 0.0
    at_first = engine.logp(prompts, [[5, 6], [7]])
    assert at_first != engine.logp(prompts[::-1], [[5, 6], [7]]) and max(at_first) < 0
    held = engine.load_weights(str(tiny_model(tmp_path / "other", seed=1)), 3)
    assert held.version == 3 and held.probes and all(p.holds for p in held.probes.values())
    other = texts()
    assert other != [first.text, second.text] and engine.logp(prompts, [[5, 6], [7]]) != at_first
    engine.load_weights(str(tiny), 4)  # what it started with: a rerun has the base without loading it
    assert texts() == [first.text, second.text] and engine.logp(prompts, [[5, 6], [7]]) == at_first
    engine._core.kill()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        engine.generate(prompts, sampling)


def test_every_job_of_a_trial_has_as_many_blocks_as_it_says(tiny, tmp_path):
    for method in ("exmate", "ppo"):
        made = config.parse(config.Job, job(tiny, tmp_path, method, "127.0.0.1:1"), where="t")
        assert made.prompts.train * made.generate.samples == BLOCKS * made.generate.batch_size
        assert len(methods(made)) == METHODS


@pytest.mark.parametrize("method", ["exmate", "ppo"])
def test_a_job_fits_on_what_is_left_of_its_cluster(tiny, tmp_path, method):
    made = config.parse(config.Job, job(tiny, tmp_path, method, "127.0.0.1:1"), where="t")
    head, other = placement.Node(1, 0, 8.0), placement.Node(2, 0, 8.0, frozenset({GROUP}))
    groups = placement.plan(made, models.shape(tiny))
    assert placement.misfit(made, groups, [head, other]) is None
    assert "too few" in str(placement.misfit(made, groups, [head]))


def test_the_driver_stops_behind_its_last_stage_as_the_command_line_would(tiny, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job(tiny, tmp_path / "run", "exmate")))
    command = [sys.executable, "-m", "benchmarks.chaos.driver", str(tmp_path / "job.yaml"), "prompts"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert [s for s in STAGES if (tmp_path / "run" / s).exists()] == ["prompts"]
    where = Where("exmate", "prompts", "prompts", "prompts")
    found = compare.rows(tmp_path, where)
    assert found.keys() == {"prompts"} and len(found["prompts"]) == 18
    assert compare.differ(found, found) == compare.NONE and compare.unaccounted(tmp_path, where) == []


def test_what_a_driver_leaves_behind_ends_with_its_session():
    orphan = "import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '600'], process_group=0); print(p.pid, flush=True)"
    leader = subprocess.Popen([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    left = psutil.Process(int(leader.stdout.readline()))
    leader.wait(timeout=20)
    with trial.none_left([leader]):
        assert left.is_running()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE


def test_a_run_that_hangs_is_no_success(monkeypatch):
    monkeypatch.setattr(trial, "MOST_S", 0.1)
    assert trial.finish(subprocess.Popen(["sleep", "600"], start_new_session=True)) == trial.HUNG


def test_compiled_extensions_are_copied_without_the_lock_of_who_loads_them(monkeypatch, tmp_path):
    theirs = tmp_path / "theirs" / "op"
    theirs.mkdir(parents=True)
    for name in ("op.so", "lock"):
        (theirs / name).write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "theirs"))
    made = Path(trial.Lab(tmp_path / "lab").environment()["TORCH_EXTENSIONS_DIR"])
    assert [p.name for p in made.rglob("*") if p.is_file()] == ["op.so"] and made.is_relative_to(tmp_path / "lab")


def test_who_holds_live_work_is_seen_from_outside(tmp_path):
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; sys.stdin.read()'])"
    engine = subprocess.Popen([sys.executable, "-c", sleeper], stdin=subprocess.PIPE)
    try:
        scene, where = Scene(tmp_path, psutil.Process(), ()), plan(0).where
        assert where.stage == "generate" and not any(scene.look(v, where) for v in (DRIVER, ENGINE, CHILD, REWARD))
        note = {"rows": [4, 5], "first": "r4", "process": f"here:{engine.pid}"}
        Storage(str(tmp_path)).write_json(note, "generate", "key", "in_flight", "batch", "000004-000002.json")
        while not (children := psutil.Process(engine.pid).children()):
            time.sleep(0.01)
        held = {v: scene.look(v, where) for v in (DRIVER, ENGINE, CHILD)}
        assert {v: f.process.pid for v, f in held.items()} == {
            DRIVER: psutil.Process().pid,
            ENGINE: engine.pid,
            CHILD: children[0].pid,
        }
        assert {f.work for f in held.values()} == {"2 rows in flight, r4 first"}
        assert scene.look(REWARD, where) is None  # it holds nothing
    finally:
        engine.communicate(timeout=20)
    assert scene.look(ENGINE, where) is None  # the note of a process that is gone


def test_a_stage_has_come_as_far_as_its_parts_or_its_steps(tmp_path):
    scene, out = Scene(tmp_path, psutil.Process(), ()), Storage(str(tmp_path))
    generate, train = plan(0).where, plan(2).where
    assert scene.reached(generate, 0.0) and not scene.reached(generate, 0.5) and not scene.reached(train, 0.0)
    for i in range(BLOCKS // 2):
        out.write_bytes(b"", "generate", "key", "responses", f"part-{i}.parquet")
    assert scene.reached(generate, 0.5) and not scene.reached(generate, 0.7)
    out.write_json({"step": 3, "steps": 6}, "train", "key", train.method, "progress.json")
    assert scene.reached(train, 0.5) and not scene.reached(train, 0.7)
    out.write_json({}, "train", "key", train.method, "done.json")
    assert not scene.reached(train, 0.5)


ROWS = {"scores": [{"id": "a", "x": 1.0}, {"id": "b", "x": float("nan")}], "prompts": [{"id": "p"}]}


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (ROWS["scores"], Difference(0, 0, ())),
        (ROWS["scores"][:1], Difference(1, 0, ("scores",))),
        ([*ROWS["scores"], ROWS["scores"][1]], Difference(0, 1, ("scores",))),
        ([{"id": "a", "x": 1.0 + 1e-15}, ROWS["scores"][1]], Difference(0, 0, ("scores",))),
        ([{"id": "a", "x": 1.0}, {"id": "c", "x": 2.0}], Difference(1, 0, ("scores",))),
    ],
)
def test_lost_doubled_and_changed_rows_are_seen(scores, found):
    assert differ(ROWS | {"scores": scores}, ROWS) == found


def outcome(**changes):
    made = {"trial": 0, "kind": "engine", "stage": "generate", "method": "exmate", "work": "4 rows", "codes": [0]}
    made |= {"recovered": "itself", "seconds_lost": 2.0, "lost": 0, "twice": 0, "unequal": [], "unaccounted": [], "commit": "c"}
    made |= {"cpu": "x"}
    return made | changes


@pytest.mark.parametrize(
    ("bad", "figure", "said"),
    [
        ({"recovered": "", "lost": None, "twice": None, "unequal": None, "unaccounted": None}, 0, "it did not recover"),
        ({"lost": 2, "unequal": ["scores"]}, 2, "**no**: scores"),
        ({"twice": 1, "unequal": ["responses"]}, 3, "**no**: responses"),
        ({"unaccounted": ["generate"]}, 4, "**no**: accounts of generate"),
    ],
)
def test_a_trial_that_went_wrong_is_on_the_page_and_in_the_figures(bad, figure, said):
    trials = [outcome(), outcome(trial=1, **bad)]
    figures = page.figures(trials, 2)
    assert [f["met"] for f in page.figures(trials[:1], 1)] == [True] * 5 + [None]
    assert page.figures(trials[:1])[0]["met"] is False  # of fifty
    assert figures[figure]["met"] is False and figures[4]["met"] is False
    machine = {"cpu": "c", "cores": "2", "memory": "1 GiB"}
    assert said in page.page({"outcomes": trials, "machine": machine}).splitlines()[-3]


def test_a_rerun_is_what_a_killed_driver_needs_and_no_other_process():
    by_itself = lambda o: page.figures([o], 1)[1]  # noqa: E731
    assert by_itself(outcome(recovered="rerun"))["met"] is False
    driver = by_itself(outcome(recovered="rerun", kind="driver while scoring"))
    assert driver["met"] is True and driver["target"] == "all of 0"
    assert page.figures([outcome(recovered="", lost=None, twice=None, unequal=None, unaccounted=None)])[-1]["measured"] is None


def test_a_learner_of_ppo_that_waits_for_rollouts_holds_no_work(tmp_path):
    scene, out = Scene(tmp_path, psutil.Process(), ()), Storage(str(tmp_path))
    assert scene._learning("exmate", 2) and not scene._learning("ppo", 2)
    out.write_bytes(b"", "train", "key", "ppo", "rollouts", f"{part(2)}.parquet")
    assert scene._learning("ppo", 2) and not scene._learning("ppo", 3)


@pytest.mark.slow  # a run in a process of its own
def test_an_undisturbed_run_of_other_code_is_not_compared_with(tiny, private_cache, tmp_path):
    lab = trial.Lab(tmp_path)
    where = Where("exmate", "prompts", "prompts", "prompts")
    (lab.model).symlink_to(tiny)
    lab.prepare(where)
    lab.prepare(where)  # there already
    made = next((lab.whole("exmate") / "run" / "prompts").glob("*/result.json")).parent
    made.rename(made.with_name("0123456789ab"))
    with pytest.raises(trial.Stale, match="other code"):
        lab.prepare(where)
    (lab.whole("exmate") / "job.yaml").write_text("name: simulated")
    with pytest.raises(trial.Stale, match="another job"):
        lab.prepare(where)


@pytest.mark.parametrize("method, losses", [("exmate", ["loss"]), ("ppo", ["policy", "value"])])
def test_what_a_training_leaves_is_compared(tiny, private_cache, tmp_path, method, losses):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job(tiny, tmp_path / "run", method)))
    learned = Run(config.load_job(tmp_path / "job.yaml")).out("train").sub(method)
    learned.write_bytes(b"weights", "adapter", "adapter.safetensors")
    learned.write_json([{"step": 1, "seconds": 3.0} | dict.fromkeys(losses, 0.5)], "curves.json")
    found = compare.rows(tmp_path, Where(method, "train", "train", "train"))
    assert set(found) == {"adapter", "losses", "rollouts" if method == "ppo" else "code gaps"}
    assert found["losses"] == [{"id": 1, "step": 1} | dict.fromkeys(losses, 0.5)]
