"""The built wheel in an empty environment: every file of the package is inside, no other is, and it works from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # builds and installs
ROOT = Path(__file__).parent.parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ctrlray", source / "ctrlray", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*PIP, "wheel", source, "--no-deps", "--no-build-isolation", "-w", out], check=True)
    (made,) = out.glob("ctrlray-*-py3-none-any.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone. What it depends on is read where the tests have it, from which the checkout is
    not visible: a path that a .pth file adds has its own .pth files, such as that of an editable install, left unread."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    assert not list(site.iterdir())
    subprocess.run([*PIP, "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_it_holds_every_file_of_the_package_and_no_other(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "ctrlray").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert inside == package
    demo = ("demo/adapter.safetensors", "demo/adapter.json", "demo/dial.json", "demo/card.md")
    jobs = ("jobs/quickstart.yaml", "jobs/hh-llama2-7b.yaml")
    for kind in (*jobs, *demo, "heads/", "prompts.jsonl", "prices.yaml", "report.html.j2"):
        assert any(n.startswith(f"ctrlray/assets/{kind}") for n in inside), kind


def ctrlray(environment: Path, cwd: Path, *words: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [environment / "bin" / "ctrlray", *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=True).stdout


def test_the_package_that_answers_is_the_installed_one(environment, tmp_path):
    code = "import ctrlray; print(ctrlray.__file__)"
    found = subprocess.run([environment / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(environment))


def test_it_says_its_version_and_its_verbs(environment, tmp_path):
    from ctrlray import __version__

    assert ctrlray(environment, tmp_path, "--version").strip().endswith(__version__)
    said = ctrlray(environment, tmp_path, "--help")
    assert all(f"\n  {verb} " in said for verb in ("pipeline", "plan", "submit", "report"))


@pytest.mark.parametrize("job", ["quickstart", "smoke", "hh-llama2-7b", "hh-qwen3-8b", "hh-llama3-70b"])
def test_packaged_jobs_resolve_without_a_clone(environment, tmp_path, job):
    said = ctrlray(environment, tmp_path, "pipeline", job, "--dry-run", "--set", f"run_root={tmp_path}/run")
    assert f"name: {job}\n" in said and "actors at least" in said


def test_it_plans_for_a_cluster_file_of_one_s_own(environment, tmp_path):
    shutil.copy(ROOT / "cluster" / "aws.yaml", tmp_path / "mine.yaml")
    made = json.loads(ctrlray(environment, tmp_path, "plan", "hh-llama2-7b", "--cluster", "mine.yaml", "--json"))
    assert made["job"] == "hh-llama2-7b" and made["total"]["dollars"] > 1


def test_without_a_clone_it_says_where_benchmarks_are(environment, tmp_path):
    command = [environment / "bin" / "ctrlray", "bench", "--list"]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "clone the repository and run `ctrlray bench`" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_quickstart_begins_with_the_prompts_inside(environment, tmp_path):
    said = ctrlray(environment, tmp_path, "prompts", "quickstart", "--set", f"run_root={tmp_path}/run")
    assert "256/256 rows" in said and len(list(tmp_path.glob("run/prompts/*/prompts"))) == 1


@pytest.mark.soak
def test_every_stage_runs_from_the_wheel(environment, tmp_path):
    """The quickstart in small, real model and engines included; Ray's workers start from the same environment."""
    said = ctrlray(environment, tmp_path, "pipeline", "smoke", "--set", f"run_root={tmp_path}/run")
    assert "took " in said and len(list(tmp_path.glob("run/*/*/result.json"))) == 8
    assert list(tmp_path.glob("run/export/*/model/model.safetensors"))
