"""No request makes the ingress fail: what its own description says may be sent and may not, and bodies broken by hand."""

from __future__ import annotations

import copy
import json
import random

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import content_type_conformance, ignored_auth, status_code_conformance

from tests.fakes import FakeJudge
from tests.ingress import CHAT, TOKENIZER, World, ask

WORLD = World(judge=FakeJudge(), completions=True)
HEADERS = {"Authorization": "Bearer ck-web"}
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", WORLD.app)
BODIES = 1000
MESSAGES = ask()["messages"]
SEEDS = (
    ask(),
    ask(control={"safety": 5, "helpfulness": 2.4}, stream=True, n=2, stream_options={"include_usage": True}),
    ask(model="tiny-start", control_strategy="rerank", candidates=3, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1),
    ask(logprobs=True, top_logprobs=2, stop=["a", "b"], max_tokens=5, presence_penalty=1.0, frequency_penalty=-1.0, user="u"),
    ask(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}),
    ask(messages=[{"role": "developer", "content": [{"type": "text", "text": "x"}]}, {"role": "tool", "tool_call_id": "c"}]),
    {"model": "tiny", "prompt": ["Once", "Twice"], "max_tokens": 4, "logprobs": 1, "stop": "x"},
    {"model": "tiny", "messages": MESSAGES, "answer": "53 good"},
)
ODD = (
    None, True, False, 0, -1, 0.5, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**30, "", "x", "\x00", "\ud800", "𝒳" * 40,
    "<|safety:1|>", [], {}, [[]], [None], {"": None}, {"type": "text"}, {"safety": 1}, ["x"] * 20, "9" * 5000,
    float("nan"), float("inf"),
)  # fmt: skip


@SCHEMA.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_the_description_says(case):
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # else most would end at an unknown name
    response = case.call(headers=HEADERS)
    assert response.status_code < 500
    case.validate_response(response, checks=[status_code_conformance, content_type_conformance, ignored_auth])


def places(value, path=()):
    """Where something stands in a body."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*path, name))
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))


def nested(depth):
    found = {}
    for _ in range(depth):
        found = {"properties": {"a": found}}
    return found


def broken(dice):
    """Path and body: one of those above with things replaced, dropped or added, or its bytes changed."""
    body = copy.deepcopy(dice.choice(SEEDS))
    path = "/v1/completions" if "prompt" in body else "/v1/control/scores" if "answer" in body else CHAT
    for _ in range(dice.randint(0, 2)):
        *above, last = dice.choice([p for p in places(body) if p] or [("model",)])
        node = body
        for step in above:
            node = node[step]
        how = dice.random()
        if how < 0.6:
            node[last] = copy.deepcopy(dice.choice(ODD))
        elif how < 0.8:
            node.pop(last, None) if isinstance(node, dict) else node.pop(last)
        elif isinstance(node, dict):
            node[dice.choice(["extra", "", "\ud800", "chat_template", "seed", "n", "control"])] = copy.deepcopy(dice.choice(ODD))
    content = json.dumps(body).encode()
    if dice.random() < 0.3:
        raw = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        content = bytes(raw[: dice.randint(0, len(raw))] if dice.random() < 0.2 else raw)
    return path, content


def test_a_thousand_broken_bodies():
    dice, statuses = random.Random(7), {}
    for _ in range(BODIES):
        path, content = broken(dice)
        answer = WORLD.web.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 403, 404), (answer.status_code, content)
        assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    assert statuses[200] > 50 and statuses[400] > 500 and WORLD.in_flight == 0
    prompts = [p for order in WORLD.engine.orders for p in order["prompt"]]
    codes = set(TOKENIZER.convert_tokens_to_ids([t for t in TOKENIZER.all_special_tokens if ":" in t]))
    assert all(sum(i in codes for i in p) in (0, 2) for p in prompts)


@pytest.mark.parametrize("depth", [10, 100, 400, 480, 500, 900, 980, 1000, 5000])
@pytest.mark.parametrize("field", ["schema", "control", "metadata", "content"])
def test_bodies_that_are_nested_deeply(field, depth):
    deep = "[" * depth + "]" * depth
    if field == "schema":
        deep = '{"a":' * depth + "1" + "}" * depth
        deep = '{"type":"json_schema","json_schema":{"schema":' + deep + "}}"
    rest = {"schema": '"response_format":' + deep, "control": '"control":' + deep, "metadata": '"metadata":' + deep}
    messages = f'[{{"role":"user","content":{deep if field == "content" else json.dumps("Hi")}}}]'
    content = '{"model":"tiny","messages":' + messages + "," + rest.get(field, '"n":1') + "}"
    answer = WORLD.web.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "a/b;;", ""])
def test_other_kinds_of_bodies(kind):
    answer = WORLD.web.post(CHAT, content=json.dumps(ask()), headers={"Content-Type": kind})
    assert answer.status_code in (200, 400)
