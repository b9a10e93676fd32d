"""Runs that are killed: nothing computed is lost, nothing is done twice, and what follows is the same to the byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ctrlray import config, pipeline, schema
from tests.e2e.tiny_job import tiny_job

pytestmark = pytest.mark.timeout(1500)
ROOT = Path(__file__).parent.parent.parent
THREE = [{"name": n, "levels": 2} for n in ("brevity", "variety", "vowels")]
SMALL_BLOCKS = {
    "generate.batch_size": 2,
    "control": {"attributes": THREE},
    "rewards": [{"type": "function", "target": "tests.fakes:three_rewards", "attributes": [a["name"] for a in THREE]}],
    "score": {"batch_size": 2},
}
AFTER_SCORING = ("distill", "train", "evaluate", "export", "report")


def write_job(folder: Path, model: Path, root: Path, changes=SMALL_BLOCKS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_job(model, root, changes)))
    return path


def start(job: Path, verb: str = "pipeline", log: Path | None = None) -> subprocess.Popen[bytes]:
    """`ctrlray VERB JOB` in a process group of its own."""
    return group([sys.executable, "-m", "ctrlray", verb, str(job)], (log or job.parent / "log.txt").open("ab"))


def group(command: list[str], out: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def finish(job: Path, verb: str = "pipeline") -> str:
    log = job.parent / f"{verb}.txt"
    process = start(job, verb, log)
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    return log.read_text()


def blocks(root: Path, stage: str, table: str) -> int:
    return len(list(root.glob(f"{stage}/*/{table}/*.parquet")))


def kill_when(job: Path, reached) -> None:
    """Start the pipeline and kill -9 its driver at a moment; Ray's processes follow it."""
    process = start(job)
    try:
        end = time.monotonic() + 300
        while not reached() and time.monotonic() < end:
            assert process.poll() is None, (job.parent / "log.txt").read_text()[-3000:]
            time.sleep(0.005)
        assert reached(), "the run did not come to the moment at which it was to be killed"
    finally:
        process.kill()
        process.wait()


def ids(run: pipeline.Run) -> dict[str, list[str]]:
    names = [a.name for a in run.job.control.attributes]
    responses = run.out("generate").read_table("responses", schema.RESPONSES, ["response_id"])
    scores = run.out("score").read_table("scores", schema.scores(names), ["response_id"])
    return {
        "prompts": sorted(p["prompt_id"] for s in ("train", "eval") for p in run.prompts(s).to_pylist()),
        "responses": sorted(responses["response_id"].to_pylist()),
        "scores": sorted(scores["response_id"].to_pylist()),
    }


def data_files(folder: Path) -> dict[str, bytes]:
    """What stages after scoring make of their tables, without what tells the time: logs, checkpoints, seconds."""
    skipped = ("ray_train", "tensorboard", "result.json", "curves.json", "progress.json", "done.json", "report.html")
    skipped += ("time.json", "starts", "took", "in_flight")
    files = [f for s in AFTER_SCORING for f in (folder / s).rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if not set(f.relative_to(folder).parts) & set(skipped)}


@pytest.fixture(scope="module")
def whole(tiny, private_cache, tmp_path_factory):
    """An undisturbed run, three attributes."""
    folder = tmp_path_factory.mktemp("whole")
    job = write_job(folder, tiny, folder / "run")
    finish(job)
    return pipeline.Run(config.load_job(job))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_three_random_moments(whole, tiny, tmp_path, seed):
    rng, root = random.Random(seed), tmp_path / "run"
    job = write_job(tmp_path, tiny, root)
    first, second = sorted(rng.sample(range(1, 15), 2))
    kill_when(job, lambda: blocks(root, "generate", "responses") >= first)
    answered = {f: f.stat().st_mtime_ns for f in root.glob("generate/*/responses/*.parquet")}
    kill_when(job, lambda: blocks(root, "score", "scores") >= second)
    step = rng.randint(1, 4)
    kill_when(job, lambda: any(f'"step": {step}' in f.read_text() for f in root.glob("train/*/*/progress.json")))
    finish(job)
    run = pipeline.Run(config.load_job(job))
    assert all(f.stat().st_mtime_ns == t for f, t in answered.items())  # what was there was not done again
    assert ids(run) == ids(whole)
    assert all(n == 1 for n in Counter(ids(run)["responses"] + [f"s{i}" for i in ids(run)["scores"]]).values())
    for stage in pipeline.STAGES:
        result = run.result(stage)
        assert result["rows_in"] == result["rows_out"] + sum(result["dropped"].values()) + sum(result["quarantined"].values())


ACTORS = {"generate": "GenerateBatch", "score": "ScoreBatch", "train": "RayTrainWorker", "evaluate": "EngineHost"}


def words(process: psutil.Process) -> str:
    """A Ray process's command line; nothing of one that ended meanwhile."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    return line if line.startswith("ray::") else ""


@pytest.mark.soak
@pytest.mark.parametrize("stage", ACTORS)
def test_a_killed_actor_is_replaced_and_the_run_finishes_by_itself(whole, tiny, tmp_path, stage):
    root = tmp_path / "run"
    for done in pipeline.STAGES[: pipeline.STAGES.index(stage)]:
        shutil.copytree(Path(whole.storage.path()) / done, root / done)
    job = write_job(tmp_path, tiny, root, SMALL_BLOCKS | {"evaluate.batch_size": 8})
    process = start(job)
    try:
        found: list[psutil.Process] = []
        while not found:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            time.sleep(0.02)
            found = [p for p in psutil.Process(process.pid).children(recursive=True) if ACTORS[stage] in words(p)]
        time.sleep(random.Random(stage).uniform(0, 8))
        found[0].kill()
        assert process.wait(timeout=600) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    finally:
        process.kill()
    assert ids(pipeline.Run(config.load_job(job))) == ids(whole)
    if stage == "train":  # back to the last snapshot, and from there the same steps
        assert adapter(root) == adapter(Path(whole.storage.path()))


def adapter(root: Path) -> bytes:
    return next(root.glob("train/*/exmate/adapter/adapter.safetensors")).read_bytes()


@pytest.mark.soak
def test_training_that_was_killed_ends_with_the_parameters_of_an_undisturbed_one(whole, tiny, tmp_path):
    """Killed behind a snapshot; optimizer, schedule, data position and random numbers go on, to the bit."""
    root = tmp_path / "run"
    for done in ("prompts", "generate", "score", "distill"):
        shutil.copytree(Path(whole.storage.path()) / done, root / done)
    job = write_job(tmp_path, tiny, root)
    kill_when(job, lambda: any('"step": 3' in f.read_text() for f in root.glob("train/*/*/progress.json")))
    kept = list(root.glob("train/*/ray_train/*/checkpoint_*/snapshot.safetensors"))
    assert kept, "the run was killed before its first snapshot"
    finish(job, "train")
    assert adapter(root) == adapter(Path(whole.storage.path()))
    curves = [yaml.safe_load(next(r.glob("train/*/exmate/curves.json")).read_text()) for r in (root, Path(whole.storage.path()))]
    assert [p["loss"] for p in curves[0]] == [p["loss"] for p in curves[1]]  # each step once, on the same examples


@pytest.mark.soak
def test_stages_after_scoring_are_byte_identical(whole, tiny, tmp_path):
    """On the same tables, in another run root: examples, adapter, grid, metrics, exported model, and the same report twice."""
    here, root = Path(whole.storage.path()), tmp_path / "run"
    for stage in ("prompts", "generate", "score"):
        shutil.copytree(here / stage, root / stage)
    job = write_job(tmp_path, tiny, root)
    finish(job)
    again, before = data_files(root), data_files(here)
    assert again.keys() == before.keys() and len(again) > 10
    assert [name for name in again if again[name] != before[name]] == []
    page = next(root.glob("report.html")).read_bytes()
    shutil.rmtree(root / "report")
    finish(job, "report")
    assert next(root.glob("report.html")).read_bytes() == page


BEGINNINGS = {
    "generate": "starting vLLM",
    "score": "starting reward actors",
    "train": "training exmate",
    "evaluate": "starting vLLM",
}


def first_often(stages: Iterable[str]) -> list[Any]:
    """The first is ready for in a blink, so `make test` has it; the others follow a whole run, in `make soak`."""
    first, *others = stages
    return [pytest.param(first, marks=pytest.mark.slow), *(pytest.param(s, marks=pytest.mark.soak) for s in others)]


def job_before(stage: str, model: Path, folder: Path, request: pytest.FixtureRequest) -> Path:
    """A job whose stages before `stage` are those of the undisturbed run."""
    job = write_job(folder, model, folder / "run")
    if stage == "generate":
        finish(job, "prompts")
    else:
        for done in pipeline.STAGES[: pipeline.STAGES.index(stage)]:
            shutil.copytree(Path(request.getfixturevalue("whole").storage.path()) / done, folder / "run" / done)
    return job


@pytest.mark.parametrize("stage", first_often(BEGINNINGS))
def test_ctrl_c_stops_a_running_stage(tiny, private_cache, tmp_path, request, stage):
    """The whole process group gets SIGINT, as from a terminal."""
    root, log = tmp_path / "run", tmp_path / "log.txt"
    job = job_before(stage, tiny, tmp_path, request)
    process = start(job, stage, log)
    while BEGINNINGS[stage] not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(3)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()[-3000:]
    assert children and psutil.wait_procs(children, timeout=20)[1] == []
    assert "the same command goes on from there" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list(root.glob("running.json"))
    assert not list(root.glob(f"{stage}/*/result.json"))


@pytest.mark.parametrize("stage", first_often(["prompts", "distill", "export", "report"]))
def test_ctrl_c_in_stages_without_actors(tiny, private_cache, tmp_path, request, stage):
    """These last no longer than a blink, so the test holds them up."""
    job = job_before(stage, tiny, tmp_path, request)
    code = (
        "import time, os, signal; from ctrlray import cli, pipeline; runners = dict(pipeline._RUNNERS)\n"
        "def slow(current, progress): print('now', flush=True); time.sleep(60)\n"
        f"runners[{stage!r}] = slow; pipeline._RUNNERS = runners\n"
        f"cli.main([{stage!r}, {str(job)!r}])"
    )
    process = group([sys.executable, "-c", code], subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if line == b"now\n":
            break
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stdout.read().decode()
    assert process.wait(timeout=60) == 130 and "the same command goes on from there" in rest and "Traceback" not in rest
