"""The built wheel: everything that a run without a clone reads is inside, nothing else is, and it works from any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ctrlray", source / "ctrlray", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out)]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)
    (made,) = out.glob("ctrlray-*-py3-none-any.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_it_holds_every_file_of_the_package_and_no_other(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "ctrlray").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert inside == package
    for kind in ("jobs/quickstart.yaml", "jobs/hh-llama2-7b.yaml", "heads/", "prompts.jsonl", "models.json", "report.html.j2"):
        assert any(n.startswith(f"ctrlray/assets/{kind}") for n in inside), kind


def ctrlray(unpacked: Path, cwd: Path, *words: str) -> str:
    """Run what was unpacked, not the checkout: an editable install comes later on the path."""
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); import ctrlray.cli; print(ctrlray.__file__); ctrlray.cli.main()"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=True)
    where, _, said = done.stdout.partition("\n")
    assert where.startswith(str(unpacked))
    return said


@pytest.mark.parametrize("job", ["quickstart", "smoke", "hh-llama2-7b", "hh-qwen3-8b", "hh-llama3-70b"])
def test_packaged_jobs_resolve_without_a_clone(unpacked, tmp_path, job):
    said = ctrlray(unpacked, tmp_path, "pipeline", job, "--dry-run", "--set", f"run_root={tmp_path}/run")
    assert f"name: {job}\n" in said and "actors at least" in said


def test_the_console_script_is_the_command_line(wheel):
    (text,) = (zipfile.ZipFile(wheel).read(n) for n in zipfile.ZipFile(wheel).namelist() if n.endswith("entry_points.txt"))
    assert b"ctrlray = ctrlray.cli:entry" in text
