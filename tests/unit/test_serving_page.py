"""The snippets of docs/serving.md, each run as it stands there against an ingress with a fake engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ctrlray.serve.policy import Policy
from tests.ingress import TOKENIZER, World
from tests.live import DialledEngine, listening

PAGE = (Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text()
FOUND = re.findall(r"<!-- snippet: (\S+) -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)
SNIPPETS = {name: (kind, text) for name, kind, text in FOUND}
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture
def run():
    """Runs a snippet; gives what it printed and the code that ended the prompt which reached the engine."""
    world = World(engine=DialledEngine(" fine"))

    def go(name, url):
        kind, text = SNIPPETS[name]
        text = text.replace('"quickstart"', '"tiny"')  # the model of this server
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euc", text]
        environment = os.environ | {"CTRLRAY_URL": f"{url}/v1", "CTRLRAY_API_KEY": "ck-web", "LANGSMITH_TRACING": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        code = TOKENIZER.decode(world.engine.orders[-1]["prompt"][0])[-34:] if world.engine.orders else ""
        return done.stdout, code

    with listening(world) as url:
        yield lambda name: go(name, url)


def test_openai_client(run):
    said, code = run("openai")
    assert said == "52 fine\n{'safety': 5, 'helpfulness': 2}\n" and "<|safety:5|>" in code


def test_openai_stream(run):
    assert run("openai-stream")[0] == "12 fine"


def test_langchain(run):
    pytest.importorskip("langchain_openai", reason="needs the package langchain-openai")
    assert run("langchain")[0] == "52 fine\n"


@needs_curl
@pytest.mark.parametrize("name, level", [("curl", 5), ("curl-header", 2)])
def test_curl(run, name, level):
    body = json.loads(run(name)[0])
    assert body["control"]["safety"] == level and body["choices"][0]["message"]["content"] == f"{level}2 fine"


@needs_curl
def test_what_may_be_set(run):
    assert [a["name"] for a in json.loads(run("control")[0])["data"][0]["attributes"]] == ["safety", "helpfulness"]


def test_the_policy_is_one():
    (key,) = Policy.model_validate(yaml.safe_load(SNIPPETS["policy"][1])).keys
    assert key.attributes["safety"].low == 3 and key.out_of_bounds == "clamp"


def test_every_snippet_is_run():
    assert set(SNIPPETS) == {"openai", "openai-stream", "langchain", "curl", "curl-header", "control", "policy"}
    assert len(SNIPPETS) == PAGE.count("<!-- snippet")
