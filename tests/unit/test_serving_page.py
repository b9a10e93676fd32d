"""The snippets of docs/serving.md against an ingress with a fake engine, where it is known what the engine says."""

from __future__ import annotations

import json

import pytest
import yaml

from ctrlray.serve import transport
from ctrlray.serve.policy import Policy
from tests.ingress import World, prompt_of
from tests.live import DialledEngine, listening
from tests.snippets import PAGE, SNIPPETS, run_snippet


@pytest.fixture
def world():
    return World(engine=DialledEngine(" fine"))


@pytest.fixture
def run(world):
    with listening(world) as url:
        yield lambda name: run_snippet(name, url, "ck-web", {'"quickstart"': '"tiny"'})


def test_openai_client(run, world):
    assert run("openai") == "52 fine\n{'safety': 5, 'helpfulness': 2}\n"
    assert "<|safety:5|>" in prompt_of(world.engine)[-34:]


def test_openai_stream(run):
    assert run("openai-stream") == "12 fine"


def test_langchain(run):
    assert run("langchain") == "52 fine\n"


@pytest.mark.parametrize("name, level", [("curl", 5), ("curl-header", 2)])
def test_curl(run, name, level):
    body = json.loads(run(name))
    assert body["control"]["safety"] == level and body["choices"][0]["message"]["content"] == f"{level}2 fine"


def test_what_may_be_set(run):
    assert [a["name"] for a in json.loads(run("control"))["data"][0]["attributes"]] == ["safety", "helpfulness"]


def test_the_policy_is_one():
    (key,) = Policy.model_validate(yaml.safe_load(SNIPPETS["policy"][1])).keys
    assert key.attributes["safety"].low == 3 and key.out_of_bounds == "clamp"


def test_what_some_servers_lack_and_how_processes_call_each_other_is_said(monkeypatch):
    monkeypatch.delenv(transport.SWITCH, raising=False)
    assert "on CPU engines `seed`" in PAGE
    (said,) = [p for p in PAGE.split("\n\n") if transport.SWITCH in p]
    assert all(f"`{name}`" in said for name in transport._VARIABLES) and "a Ray without one is refused" in said
    assert f"`{transport.chosen()}`\n(the default" in said


def test_every_snippet_is_run():
    assert set(SNIPPETS) == {"openai", "openai-stream", "langchain", "curl", "curl-header", "control", "policy"}
    assert len(SNIPPETS) == PAGE.count("<!-- snippet")
