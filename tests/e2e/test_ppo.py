"""Reinforcement learning on real engines: whoever dies, no prompt is lost and none is used twice."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import psutil
import pytest

from ctrlray import config, pipeline, schema
from ctrlray.train.ppo.rollouts import Prompts
from tests.e2e.test_killed import finish, start, words, write_job

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]
STEPS = 24
CHANGES = {
    "train.objectives": [
        {"type": "clm"},
        {
            "type": "ppo",
            "start": "clm",
            "steps": STEPS,
            "prompts_per_step": 2,
            "group_size": 2,
            "batch_size": 4,
            "epochs": 2,
            "advantage": "gae",
            "learning_rate": 1e-3,
            "sampling": {"max_tokens": 12, "temperature": 0.9, "min_p": 0},
        },
    ],
    "train.eval_every": 7,
    "train.max_failures": 3,
}
NAMES = ["brevity", "variety"]


def step_of(root: Path) -> int:
    found = list(root.glob("train/*/ppo/progress.json"))
    try:
        return int(found[0].read_text().split('"step": ')[1].split(",")[0]) if found else 0
    except IndexError:
        return 0


def until(process, root: Path, step: int, log: Path) -> None:
    while step_of(root) < step:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)


def kill(process, word: str) -> None:
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if word in words(p)]
    assert found, f"no process says {word!r}"
    found[0].kill()


@pytest.fixture(scope="module")
def disturbed(tiny, private_cache, tmp_path_factory):
    """One training whose engine, reward actor, worker and driver are killed in turn, each behind a few more steps."""
    folder = tmp_path_factory.mktemp("ppo")
    job, log = write_job(folder, tiny, folder / "run", CHANGES), folder / "log.txt"
    process = start(job, log=log)
    try:
        for step, word in ((3, "EngineHost"), (7, "RewardHost"), (11, "RayTrainWorker")):
            until(process, folder / "run", step, log)
            kill(process, word)
        until(process, folder / "run", 16, log)
        before = {f.name: f.stat().st_mtime_ns for f in (folder / "run").glob("train/*/ppo/rollouts/*.parquet")}
        process.kill()
        assert process.wait() != 0
    finally:
        process.kill()
    finish(job, "train")
    return pipeline.Run(config.load_job(job)), before


def test_every_step_has_its_rollouts_once_and_none_is_lost(disturbed):
    run, _ = disturbed
    place, ppo = run.out("train").sub("ppo"), run.job.train.objectives[1]
    rows = place.read_table("rollouts", schema.rollouts(NAMES)).to_pylist()
    renderer = run.base.renderer(config_space(run))
    order = Prompts(run.prompts("train").to_pylist(), config_space(run), renderer, ppo, run.job.model.max_context, run.job.seed)
    wanted = [a.rollout_id for step in range(STEPS) for a in order.asks(step)]
    assert [r["rollout_id"] for r in rows] == wanted and len(set(wanted)) == len(wanted) == STEPS * ppo.rollouts_per_step
    assert all(r["weights_version"] == r["step"] for r in rows)  # no staleness
    accounts = run.result("train")["facts"]["ppo"]
    assert accounts["rollouts"] == len(rows) == accounts["used"] + sum(accounts["dropped"].values())
    assert accounts["dropped"] == {}


def config_space(run):
    from ctrlray.control import ControlSpace

    return ControlSpace.of(run.job.control)


def test_what_was_sampled_before_the_driver_died_is_not_sampled_again(disturbed):
    run, before = disturbed
    here = Path(run.out("train").sub("ppo", "rollouts").path())
    assert len(before) >= 16 and {n: (here / n).stat().st_mtime_ns for n in before} == before


def test_curves_go_on_and_hold_what_a_step_measured(disturbed):
    run, _ = disturbed
    curves = run.out("train").sub("ppo").read_json("curves.json")
    assert [p["step"] for p in curves] == list(range(1, STEPS + 1))
    assert all(p["updates"] == 4 and p["used"] == p["rollouts"] == 8 for p in curves)  # 2 epochs of 2 batches
    for key in ("reward", "kl", "value", "explained_variance", "clip_fraction", "generate_s", "sync_s", "prefix_hit_rate"):
        assert all(key in p for p in curves), key
    assert all(p["mismatch"] < 1e-3 for p in curves)  # the trainer and the engine agree on what was sampled
    assert curves[0]["kl"] == pytest.approx(0, abs=1e-4) and curves[-1]["kl"] > 1e-3
    assert all("kl_base" in p for p in curves if p["step"] % 7 == 0)


@pytest.mark.soak
def test_the_same_rollouts_give_the_same_adapter(disturbed, tiny, tmp_path):
    """Whatever was killed in between: in an undisturbed training the rollouts that lie there are learned from alike."""
    run, _ = disturbed
    here, root = Path(run.storage.path()), tmp_path / "run"
    for stage in ("prompts", "generate", "score", "distill"):
        shutil.copytree(here / stage, root / stage)
    (trained,) = here.glob("train/*")
    for kept in ("clm", "ppo/rollouts"):
        shutil.copytree(trained / kept, root / "train" / trained.name / kept)
    job = write_job(tmp_path, tiny, root, CHANGES)
    finish(job, "train")
    adapters = [next(r.glob("train/*/ppo/adapter/adapter.safetensors")).read_bytes() for r in (here, root)]
    assert adapters[0] == adapters[1]
