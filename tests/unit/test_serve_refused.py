"""What the ingress refuses: fields, bodies, callers, routes."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from ctrlray.serve import routes
from ctrlray.serve.api import ChatRequest
from ctrlray.serve.policy import Bounds
from tests.ingress import CHAT, World, ask


@pytest.fixture
def world():
    return World(attributes={"safety": Bounds(low=2, high=4)})


SCHEMA = {"type": "json_schema"}


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"chat_template": "{{ messages }}"}, "chat_template", "not accepted"),
        ({"chat_template_kwargs": {"safety": 1}}, "chat_template_kwargs", "not accepted"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "not accepted"),
        ({"continue_final_message": True}, "continue_final_message", "not accepted"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids", "not accepted"),
        ({"logit_bias": {"1": 100}}, "logit_bias", "not accepted"),
        ({"vllm_xargs": {}}, "vllm_xargs", "not accepted"),
        ({"guided_regex": ".*"}, "guided_regex", "not accepted"),
        ({"tools": []}, "tools", "not accepted"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not accepted"),
        ({"echo": True}, "echo", "not accepted"),
        ({"control": {"kindness": 1}}, "control.kindness", "unknown attribute"),
        ({"control": {"safety": "5"}}, "control.safety", "valid number"),
        ({"control": {"safety": True}}, "control.safety", "valid number"),
        ({"control": {"safety": 6}}, "control.safety", "1..5"),
        ({"control": [5]}, "control", "valid dictionary"),
        ({"control_strategy": "rerank"}, "control_strategy", "no rewards"),
        ({"candidates": 3}, "candidates", "belong to"),
        ({"seed": 1}, "seed", "CPU engine"),
        ({"temperature": 2.1}, "temperature", "less than"),
        ({"max_tokens": 0}, "max_tokens", "greater than"),
        ({"max_tokens": 399}, "max_tokens", "does not fit"),
        ({"n": 17}, "n", "17 is above the 16"),
        ({"stop": [""]}, "stop", "at least 1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"temperature": 0, "n": 2}, "temperature", "the same"),
        ({"seed": 2**63 - 1}, "seed", "less than"),
        ({f"field{i}": 0 for i in range(99)}, None, "an object of 101 fields"),
        ({"messages": [{f"field{i}": 0 for i in range(99)}]}, "messages.0", "an object of 99 fields"),
        ({"response_format": SCHEMA | {"json_schema": {"schema": {"x": [{"default": 2**64}]}}}}, "response_format", "64 bits"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, None, "needs stream"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, None, "two names"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "belongs to type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "Input should be"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls", "not accepted"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages.0.role", "Input should be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", ""),
        ({"messages": [{"role": "user", "content": "x" * 8000}]}, None, "8000 characters"),
        ({"messages": [{"role": "user", "content": "x" * 395}]}, None, "takes 400 tokens"),
    ],
)
def test_refused_with_the_field_and_nothing_reaches_the_engine(fields, param, words):
    world = World()
    answer = world.web.post(CHAT, json=ask(**fields))
    assert answer.status_code in (400, 403), answer.text
    error = answer.json()["error"]
    assert words in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert (error["param"] or "").startswith(param or ""), error
    assert world.engine.orders == []


def test_long_lists_end_at_their_first_error():
    """Errors are made and copied in the event loop, all of them."""
    for bad in ([{"role": "user", "content": [0] * 1024}] * 2048, [{f"field{i}": 0 for i in range(64)}] * 2048):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate(ask(messages=bad))
        assert caught.value.error_count() < 70


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"x"', b"[" * 50_000, b'{"model": ' + b"9" * 6000 + b"}", b'{"a": NaN}'],
)
def test_bodies_that_are_no_requests(world, content):
    answer = world.web.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_characters_that_no_utf8_has(world):
    """Lone surrogates are legal in JSON; in a key they come back in the error."""
    chat = '{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}'
    for body in (chat, '{"\\ud800": 1}', '{"control":{"\\udfff":1}}', '{"\\udfff":"\\ud800"}'):
        answer = world.web.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400


def test_no_key_no_answer(world):
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer ck-other"}, {"Authorization": "Basic ck-web"}):
        for path in ("/v1/models", "/v1/control", "/metrics", "/v1/nowhere"):
            answer = world.client(None).get(path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/healthz", "/docs", "/openapi.json", "/"):
        assert world.client(None).get(path).status_code == 200


def test_the_header_is_there_once(world):
    """A second one could be the one that a proxy wrote, or the one that it meant to replace."""
    twice = [("X-Control", "safety=3"), ("X-Control", "helpfulness=3")]
    for headers in (twice, [twice[0], ("x-control", "")]):
        refused = world.web.post(CHAT, json=ask(), headers=headers)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "X-Control"
        assert "2 times" in refused.json()["error"]["message"]
    assert world.engine.orders == [] and world.web.post(CHAT, json=ask(), headers=twice[:1]).status_code == 200


def test_plain_completions_refuse_the_header(world):
    body = {"model": "tiny", "prompt": "x"}
    refused = world.admin.post("/v1/completions", json=body, headers={"X-Control": "safety=3"})
    assert refused.status_code == 400 and "take no control" in refused.json()["error"]["message"] and world.engine.orders == []


def test_answers_of_several_prompts_count_together(world):
    """32 prompts of 16 answers each would be 512 answers of a key that may have 16."""
    body = {"model": "tiny", "prompt": ["x"] * 5}
    refused = world.admin.post("/v1/completions", json=body | {"n": 4})
    assert refused.status_code == 403 and refused.json()["error"]["param"] == "n" and world.engine.orders == []
    assert "n=4 of 5 prompts, 20 answers, is above the 16" in refused.json()["error"]["message"]
    assert world.admin.post("/v1/completions", json=body | {"n": 3}).status_code == 200


def test_the_page_is_rendered_once(world, monkeypatch):
    rendered = []
    monkeypatch.setattr(routes, "api_page", lambda description: rendered.append(description) or "page")
    assert [world.client(None).get("/docs").text for _ in range(3)] == ["page"] * 3 and len(rendered) == 1


def test_stock_routes_do_not_exist(world):
    for path in (
        "/tokenize", "/detokenize", "/v1/embeddings", "/v1/score", "/score", "/rerank", "/pooling", "/v1/responses",
        "/v1/audio/transcriptions", "/invocations", "/load_lora_adapter", "/v1/load_lora_adapter", "/reset_prefix_cache",
        "/inference/v1/generate", "/v1/chat/completions/render", "/redoc", "/version",
    ):  # fmt: skip
        for verb in ("GET", "POST"):
            answer = world.admin.request(verb, path, json={})
            assert answer.status_code == 404 and "no route" in answer.json()["error"]["message"], path
    assert world.admin.get(CHAT).status_code == 405


def test_page_and_description_agree_and_need_no_network(world):
    page, description = world.web.get("/docs").text, world.web.get("/openapi.json").json()
    assert set(description["paths"]) == {
        CHAT, "/v1/completions", "/v1/control", "/v1/control/scores", "/v1/models", "/v1/models/{model}", "/metrics", "/healthz",
    }  # fmt: skip
    for path in description["paths"]:
        assert path in page
    assert "control_strategy" in page and "https://" not in page and not re.search(r"<(script|link)", page)
