"""The pure parts of the chaos trials: which process dies when, what simulated engines answer, how runs are compared."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

from benchmarks.chaos import core, page
from benchmarks.chaos.compare import Difference, differ
from benchmarks.chaos.driver import _simulated
from benchmarks.chaos.job import BLOCKS, job
from benchmarks.chaos.plan import CHILD, DRIVER, ENGINE, KINDS, REWARD, plan
from benchmarks.chaos.scene import Scene
from benchmarks.chaos.simulated import SimulatedSpec
from ctrlray import config
from ctrlray.engine.engine import EngineSpec
from ctrlray.pipeline import Run
from ctrlray.tables import Storage
from tests.fakes import tiny_model


def test_fifty_trials_kill_each_kind_five_times_in_all_its_places():
    trials = [plan(number) for number in range(50)]
    assert Counter(t.kind for t in trials) == dict.fromkeys(KINDS, 5)
    for kind, (victim, places) in KINDS.items():
        mine = [t for t in trials if t.kind == kind]
        assert {t.where for t in mine} == set(places) and {t.victim for t in mine} == {victim}
        assert len({t.share for t in mine}) == 5  # at moments of their own
    assert [plan(number) for number in range(50)] == trials


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
    held = engine.load_weights(str(tiny_model(tmp_path / "other", seed=1)), 3)
    assert held.version == 3 and held.probes and all(p.holds for p in held.probes.values())
    other = texts()
    assert other != [first.text, second.text]
    engine.load_weights(str(tiny), 4)
    back = texts()
    again = spec.build()
    again.load_weights(str(tiny), 1)
    assert back == [s[0].text for s in again.generate(prompts, sampling)] != other
    again._core.kill()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        again.generate(prompts, sampling)


def test_every_job_of_a_trial_has_as_many_blocks_as_it_says(tiny, tmp_path):
    for method in ("exmate", "ppo"):
        made = config.parse(config.Job, job(tiny, tmp_path, method, "127.0.0.1:1"), where="t")
        assert made.prompts.train * made.generate.samples == BLOCKS * made.generate.batch_size


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
    return made | changes


@pytest.mark.parametrize(
    ("bad", "figure", "said"),
    [
        ({"recovered": "", "lost": None, "twice": None, "unequal": None, "unaccounted": None}, 0, "it did not recover"),
        ({"lost": 2, "unequal": ["scores"]}, 1, "**no**: scores"),
        ({"twice": 1, "unequal": ["responses"]}, 2, "**no**: responses"),
        ({"unaccounted": ["generate"]}, 3, "**no**: accounts of generate"),
    ],
)
def test_a_trial_that_went_wrong_is_on_the_page_and_in_the_figures(bad, figure, said):
    trials = [outcome(), outcome(trial=1, **bad)]
    figures = page.figures(trials)
    assert [f["met"] for f in page.figures(trials[:1])] == [True] * 4 + [None]
    assert figures[figure]["met"] is False and figures[3]["met"] is False
    machine = {"cpu": "c", "cores": "2", "memory": "1 GiB"}
    assert said in page.page({"outcomes": trials, "machine": machine}).splitlines()[-3]
