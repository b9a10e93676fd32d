"""No request makes the ingress fail: what its own description says may be sent and may not, and bodies broken by hand."""

from __future__ import annotations

import json
import random

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import content_type_conformance, ignored_auth, status_code_conformance

from tests.fakes import FakeJudge
from tests.fuzzing import broken, seeds
from tests.ingress import CHAT, TOKENIZER, World, ask

WORLD = World(judge=FakeJudge(), completions=True)
HEADERS = {"Authorization": "Bearer ck-web"}
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", WORLD.app)
BODIES = 1000
GOOD = seeds("tiny", "tiny-start", {"safety": 5, "helpfulness": 2.4}, "53 good")


@SCHEMA.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_the_description_says(case):
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # else most would end at an unknown name
    response = case.call(headers=HEADERS)
    assert response.status_code < 500
    case.validate_response(response, checks=[status_code_conformance, content_type_conformance, ignored_auth])


def nested(depth):
    found = {}
    for _ in range(depth):
        found = {"properties": {"a": found}}
    return found


def test_a_thousand_broken_bodies():
    dice, statuses = random.Random(7), {}
    for _ in range(BODIES):
        path, content = broken(dice, GOOD)
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
