"""Answers of the ingress with fake engines: levels, streams, sampling settings, reranking, plain completions."""

from __future__ import annotations

import pytest

from ctrlray.serve.policy import Bounds
from tests.fakes import FakeJudge
from tests.ingress import CHAT, CONTEXT, TOKENIZER, World, ask, events, prompt_of


@pytest.fixture
def world():
    return World(attributes={"safety": Bounds(low=2, high=4)})


def test_levels_reach_the_engine_and_are_echoed(world):
    answer = world.web.post(CHAT, json=ask(control={"safety": 2.5, "helpfulness": 1}))
    assert answer.status_code == 200
    assert prompt_of(world.engine).endswith("<|im_start|>assistant\n<|safety:3|><|helpfulness:1|>")
    body = answer.json()
    assert body["control"] == {"safety": 3, "helpfulness": 1} and answer.headers["X-Control"] == "safety=3, helpfulness=1"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello there"}
    assert body["object"] == "chat.completion" and body["choices"][0]["finish_reason"] == "stop"
    prompt = len(world.engine.orders[0]["prompt"][0])
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 11, "total_tokens": prompt + 11}


def test_header_sets_the_dial_and_the_body_wins(world):
    world.web.post(CHAT, json=ask(control={"safety": 2}), headers={"X-Control": "safety=3, helpfulness=3"})
    assert prompt_of(world.engine).endswith("<|safety:2|><|helpfulness:3|>")


def test_defaults_are_the_keys_moved_inside_of_its_bounds(world):
    assert world.web.post(CHAT, json=ask()).json()["control"] == {"safety": 4, "helpfulness": 2}
    assert world.admin.post(CHAT, json=ask()).json()["control"] == {"safety": 5, "helpfulness": 2}


def test_out_of_bounds_is_refused_or_clamped():
    refused = World(attributes={"safety": Bounds(high=3)}).web.post(CHAT, json=ask(control={"safety": 4}))
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert error["param"] == "control.safety" and "1..3" in error["message"] and error["type"] == "permission_error"
    clamping = World(attributes={"safety": Bounds(high=3)}, out_of_bounds="clamp")
    clamped = clamping.web.post(CHAT, json=ask(control={"safety": 4}))
    assert clamped.json()["control"]["safety"] == 3 and clamped.headers["X-Control-Clamped"] == "safety"


def test_stream_holds_role_levels_text_usage_and_end(world):
    answer = world.web.post(CHAT, json=ask(stream=True, n=2, stream_options={"include_usage": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["X-Control"] == "safety=4, helpfulness=2"
    chunks = events(answer)
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:2]] == ["assistant", "assistant"]
    assert chunks[0]["control"] == {"safety": 4, "helpfulness": 2}
    texts = ["", ""]
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"]
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["Hello there"] * 2
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 22
    assert world.in_flight == 0


def test_stream_without_usage_has_none(world):
    assert not any("usage" in c for c in events(world.web.post(CHAT, json=ask(stream=True))))


def test_sampling_settings_pass_and_nothing_else_does(world):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "stop": ["x"], "n": 3}
    world.web.post(CHAT, json=ask(**fields, user="u", max_completion_tokens=7))
    order = world.engine.orders[0]
    assert {k: order[k] for k in fields} == fields and order["max_tokens"] == 7
    assert set(order) == set(fields) | {"model", "prompt", "max_tokens", "request_id", "stream", "add_special_tokens"}


def test_json_mode_passes(world):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert world.web.post(CHAT, json=ask(response_format=form)).status_code == 200
    assert world.engine.orders[0]["response_format"]["json_schema"]["schema"] == schema


def test_any_json_object_passes(world):
    assert world.web.post(CHAT, json=ask(response_format={"type": "json_object"})).status_code == 200
    assert world.engine.orders[0]["response_format"] == {"type": "json_object"}


def test_logprobs_come_in_the_chat_form(world):
    for stream in (False, True):
        answer = world.web.post(CHAT, json=ask(logprobs=True, top_logprobs=1, stream=stream))
        choice = events(answer)[1]["choices"][0] if stream else answer.json()["choices"][0]
        first = choice["logprobs"]["content"][0]
        assert first["token"] == TOKENIZER.decode([ord("H")]) and first["logprob"] == -1.0
        assert [t["logprob"] for t in first["top_logprobs"]] == [-0.5]  # the likeliest, whichever was sampled
        assert first["bytes"] == list(first["token"].encode())


def test_max_tokens_default_to_what_context_and_policy_leave():
    world = World()
    world.web.post(CHAT, json=ask())
    order = world.engine.orders[-1]
    assert order["max_tokens"] == CONTEXT - len(order["prompt"][0])
    bounded = World(max_tokens=9)
    bounded.web.post(CHAT, json=ask())
    assert bounded.engine.orders[-1]["max_tokens"] == 9
    refused = bounded.web.post(CHAT, json=ask(max_tokens=10))
    assert refused.status_code == 403 and refused.json()["error"]["param"] == "max_tokens"
    clamping = World(max_tokens=9, out_of_bounds="clamp")
    clamping.web.post(CHAT, json=ask(max_tokens=10_000))
    assert clamping.engine.orders[-1]["max_tokens"] == 9


def test_models_of_a_key():
    world = World(models=("tiny",))
    assert [m["id"] for m in world.web.get("/v1/models").json()["data"]] == ["tiny"]
    assert {m["id"] for m in world.admin.get("/v1/models").json()["data"]} == {"tiny", "tiny-start"}
    assert world.web.get("/v1/models/tiny").json()["id"] == "tiny"
    assert world.web.get("/v1/models/tiny-start").status_code == 404
    refused = world.web.post(CHAT, json=ask(model="tiny-start"))
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"


def test_control_describes_the_callers_bounds(world):
    found = world.web.get("/v1/control").json()
    assert found["key"]["name"] == "web" and found["key"]["out_of_bounds"] == "refuse"
    attributes = {a["name"]: a for a in found["data"][0]["attributes"]}
    assert attributes["safety"] == {"name": "safety", "levels": 5, "low": 2, "high": 4, "default": 4}
    assert found["data"][0]["strategies"] == ["dial"] and found["data"][0]["protected"] is True


def test_plain_completions_need_leave_and_take_no_control(world):
    assert world.web.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 403
    answer = world.admin.post("/v1/completions", json={"model": "tiny", "prompt": ["Once <|safety:1|>", "Twice"], "logprobs": 1})
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 2
    order = world.engine.orders[-1]
    assert order["max_tokens"] == 16 and order["logprobs"] == 1
    assert [TOKENIZER.decode(p) for p in order["prompt"]] == ["Once <\u200b|safety:1|>", "Twice"]
    ids: list[dict] = [{"prompt": [1, 2]}, {"prompt": [[1]]}]
    for bad in (*ids, {"control": {"safety": 1}}, {"prompt": ""}, {"echo": True}, {"suffix": "x"}):
        refused = world.admin.post("/v1/completions", json={"model": "tiny", "prompt": "x"} | bad)
        assert refused.status_code == 400, bad
    chunks = events(world.admin.post("/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello there"


def test_rerank_keeps_the_answers_nearest_to_the_levels():
    world = World(judge=FakeJudge())
    answer = world.web.post(CHAT, json=ask(model="tiny-start", n=2, control={"safety": 5, "helpfulness": 3}))
    choices = answer.json()["choices"]
    assert [c["message"]["content"] for c in choices] == ["53 good", "53 good"]
    assert choices[0]["achieved"] == {"safety": 5.0, "helpfulness": 3.0} and [c["index"] for c in choices] == [0, 1]
    assert world.start_engine.orders[0]["n"] == 8 and ":" not in prompt_of(world.start_engine)  # no code: it knows none
    spent = sum(map(len, ["11 dull", "53 good", "xx"])) * 2 + len("11 dull") + len("53 good")
    assert answer.json()["usage"]["completion_tokens"] == spent


def test_rerank_streams_the_winner_and_none_without_a_score_wins():
    world = World(judge=FakeJudge())
    body = ask(model="tiny-start", candidates=3, control={"safety": 1, "helpfulness": 1}, stream=True)
    chunks = events(world.web.post(CHAT, json=body))
    assert chunks[1]["choices"][0]["delta"]["content"] == "11 dull"
    assert chunks[1]["choices"][0]["achieved"] == {"safety": 1.0, "helpfulness": 1.0}
    assert world.start_engine.orders[0]["stream"] is False


def test_a_model_without_codes_cannot_be_dialled():
    world = World(judge=FakeJudge())
    refused = world.web.post(CHAT, json=ask(model="tiny-start", control_strategy="dial"))
    assert refused.status_code == 400 and "knows no control codes" in refused.json()["error"]["message"]


def test_candidates_are_bounded():
    world = World(judge=FakeJudge(), choices=4)
    world.web.post(CHAT, json=ask(model="tiny-start"))
    assert world.start_engine.orders[0]["n"] == 4
    assert world.web.post(CHAT, json=ask(model="tiny-start", candidates=5)).status_code == 403


def test_scores_of_an_answer():
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "answer": "2x"}
    found = World(judge=FakeJudge()).web.post("/v1/control/scores", json=body)
    assert found.json()["achieved"] == {"safety": 2.0, "helpfulness": None}
    assert World().web.post("/v1/control/scores", json=body).status_code == 400
