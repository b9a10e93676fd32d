"""The pages say what the code says: error messages, commands and job files on them exist, and generated ones are up to date."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from benchmarks import performance
from benchmarks.chaos import page as chaos
from ctrlray.cli import main
from ctrlray.config import Job, packaged_jobs, parse

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "cluster" / "README.md", *ROOT.glob("jobs/*/README.md"), *ROOT.glob("docs/**/*.md")])
LEAST_WORDS = 2


def text_of(node: ast.AST) -> str | None:
    """A string of the source with … for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


@pytest.fixture(scope="module")
def strings() -> set[str]:
    found = set()
    for path in (ROOT / "ctrlray").rglob("*.py"):
        found |= {text for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if (text := text_of(node))}
    return found


def quoted() -> list[str]:
    """Messages in the headings of the page: whatever is set as code there."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = [line for line in page.splitlines() if line.startswith("### ")]
    return [text.strip() for line in headings for _, text in re.findall(r"(`+)(.+?)\1(?!`)", line)]


@pytest.mark.parametrize("message", quoted())
def test_an_error_message_on_the_page_is_one_of_the_code(message, strings):
    assert len(message.replace("…", "").split()) >= LEAST_WORDS, "too little to be found by"
    assert any(message in s for s in strings), f"no source says {message!r}"


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.strip() for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("ctrlray ")})


@pytest.mark.parametrize("line", commands())
def test_a_command_on_a_page_is_one_of_the_program(line):
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = main
    while isinstance(command, click.Group):
        if command.name == "serve" and words[0] not in command.commands:
            words = ["run", *words]  # `serve MODEL` is `serve run MODEL`
        name = words.pop(0)
        assert name in command.commands, f"{line}: no command {name!r}"
        command = command.commands[name]
    known = {option for p in command.params for option in p.opts}
    used = {w.split("=")[0] for w in words if w.startswith("-")}
    assert used <= known, f"{line}: no options {sorted(used - known)}"
    for word in (w for w in words if w.startswith(("jobs/", "cluster/"))):
        assert (ROOT / word).is_file(), f"{line}: no file {word}"
    if command.name in ("pipeline", "plan", "submit") and words and not words[0].startswith("-"):
        assert words[0] in packaged_jobs() or words[0].endswith(".yaml"), line


JOBS = [(p.name, b) for p in PAGES for b in blocks(p, "yaml") if b.startswith("name:") and "\ncontrol:" in b]


@pytest.mark.parametrize(("page", "block"), JOBS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(JOBS)])
def test_a_job_file_on_a_page_is_valid(page, block):
    parse(Job, yaml.safe_load(block), where=page)


def test_there_are_such_messages_commands_and_job_files():
    assert len(quoted()) > 20 and len(commands()) > 20 and len(JOBS) > 5


def test_the_page_of_performance_is_up_to_date():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page == performance.page(performance.stored()), "write it anew: python -m benchmarks.performance"


def test_the_page_of_reliability_is_up_to_date():
    stored = json.loads(chaos.STORED.read_text(encoding="utf-8"))
    assert chaos.PAGE.read_text(encoding="utf-8") == chaos.page(stored), "write it anew: python -m benchmarks.chaos"


def test_every_page_is_in_the_navigation():
    """What the site is built of; `make docs` builds it strictly."""
    written = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert not [p for p in pages if f" {p}\n" not in written]
