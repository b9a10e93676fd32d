"""The ingress with a fake engine: what reaches the engine, what comes back, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
from starlette.testclient import TestClient

from ctrlray.serve.desk import Desk
from ctrlray.serve.dial import Dial, Range
from ctrlray.serve.front import Front
from ctrlray.serve.policy import Bounds, Key, Policy, hashed
from ctrlray.serve.prompts import Prompts
from ctrlray.serve.routes import create_app
from ctrlray.serve.served import Served
from tests.fakes import FakeEngine, FakeJudge, dialled_tokenizer

DIAL = Dial((Range("safety", 5, 1, 5, 5), Range("helpfulness", 3, 1, 3, 2)))
TOKENIZER, PLAIN = dialled_tokenizer(DIAL), dialled_tokenizer(DIAL, coded=False)
CONTEXT = 400
CHAT = "/v1/chat/completions"


class World:
    """One ingress, its fake engines, and a client for each key."""

    def __init__(self, judge=None, room=99, max_body_bytes=100_000, body_timeout_s=30.0, **limits) -> None:
        self.engine, self.start_engine = FakeEngine(), FakeEngine(["11 dull", "53 good", "xx"])
        prompts = Prompts(TOKENIZER, DIAL, True, CONTEXT)
        models = [
            Served("tiny", DIAL, prompts, self.engine, False, "exmate"),
            Served("tiny-start", DIAL, Prompts(PLAIN, DIAL, False, CONTEXT), self.start_engine, True, "start"),
        ]
        own = Key.model_validate({"name": "web", "hash": hashed("ck-web")} | limits)
        admin = Key(name="admin", hash=hashed("ck-admin"), completions=True)
        self.policy = Policy(keys=(own, admin))
        self.desk = Desk({m.name: room for m in models})
        self.front = Front(models, lambda: self.policy, self.desk, judge)
        self.app = create_app(self.front, max_body_bytes, body_timeout_s)
        self.web = self.client("ck-web")
        self.admin = self.client("ck-admin")

    def client(self, key: str | None) -> TestClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return TestClient(self.app, headers=headers, raise_server_exceptions=False)

    @property
    def in_flight(self) -> int:
        return self.desk._limits.in_flight()


def ask(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]} | fields


def events(response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def prompt_of(engine: FakeEngine) -> str:
    return TOKENIZER.decode(engine.orders[-1]["prompt"][0])


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


def test_rates_are_429_with_the_time_to_wait():
    world = World(requests_per_minute=1)
    assert world.web.post(CHAT, json=ask()).status_code == 200
    refused = world.web.post(CHAT, json=ask())
    assert refused.status_code == 429 and 55 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert world.admin.post(CHAT, json=ask()).status_code == 200


def test_tokens_that_were_not_taken_are_given_back():
    world = World(tokens_per_minute=400)
    for _ in range(3):
        assert world.web.post(CHAT, json=ask(max_tokens=100)).status_code == 200
    assert world.web.post(CHAT, json=ask(max_tokens=200, n=3)).status_code == 403  # more than a minute's worth


def test_full_queue_is_429():
    world = World(room=0)
    refused = world.web.post(CHAT, json=ask())
    assert refused.status_code == 429 and "queue" in refused.json()["error"]["message"] and refused.headers["Retry-After"] == "5"


@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors_have_a_status(world, stream):
    world.engine.error = {"message": "bad grammar", "code": 400, "param": "response_format"}
    refused = world.web.post(CHAT, json=ask(stream=stream))
    assert refused.status_code == 400 and refused.json()["error"]["message"] == "bad grammar"
    world.engine.error = {"message": "secret path", "code": 500}
    failed = world.web.post(CHAT, json=ask(stream=stream))
    assert failed.status_code == 503 and "secret" not in failed.text and failed.headers["Retry-After"] == "1"
    assert world.in_flight == 0


def test_replica_that_dies_mid_stream_ends_it_with_an_error_event(world):
    world.engine.breaks_after = 4
    chunks = events(world.web.post(CHAT, json=ask(stream=True)))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hell"
    assert chunks[-1]["error"]["code"] == "engine_error"
    assert world.in_flight == 0 and 'ctrlray_requests_total{key="web",model="tiny",status="503"} 1.0' in metrics(world)


def metrics(world: World) -> str:
    answer = world.admin.get("/metrics")
    assert answer.status_code == 200
    return answer.text


def test_metrics_by_level_and_model(world):
    world.web.post(CHAT, json=ask(control={"safety": 3}))
    world.web.post(CHAT, json=ask(stream=True))
    world.web.post(CHAT, json=ask(control={"safety": 9}))
    world.client(None).post(CHAT, json=ask())
    text = metrics(world)
    assert 'ctrlray_requests_total{key="web",model="tiny",status="200"} 2.0' in text
    assert 'ctrlray_request_seconds_count{attribute="safety",level="3",model="tiny"} 1.0' in text
    assert 'ctrlray_level_tokens_total{attribute="helpfulness",level="2",model="tiny"} 22.0' in text
    assert 'ctrlray_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'ctrlray_refused_total{key="web",status="400"} 1.0' in text
    assert 'ctrlray_refused_total{key="",status="401"} 1.0' in text
    assert "ck-web" not in text


def test_open_metrics(world):
    world.policy = world.policy.model_copy(update={"metrics": "open"})
    assert world.client(None).get("/metrics").status_code == 200


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def send_body(app, messages, headers=()):
    """Drive the application by hand; messages are (delay in s, ASGI message). Returns what it sent."""
    sent, waiting = [], iter(messages)

    async def receive():
        delay, message = next(waiting, (60, None))
        await asyncio.sleep(delay)
        return message

    async def send(message):
        sent.append(message)

    pairs = [(b"authorization", b"Bearer ck-web"), (b"content-type", b"application/json"), *headers]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"", "headers": pairs}
    await app(scope, receive, send)
    return sent


def body_part(content: bytes, more: bool):
    return {"type": "http.request", "body": content, "more_body": more}


def test_long_bodies_are_refused_early():
    world = World(max_body_bytes=1000)
    declared = run(send_body(world.app, [], [(b"content-length", b"1001")]))  # not a byte of it was read
    assert declared[0]["status"] == 413 and (b"connection", b"close") in declared[0]["headers"]
    endless = [(0, body_part(b"x" * 600, True))] * 9
    assert run(send_body(world.app, endless))[0]["status"] == 413


def test_bodies_that_trickle_in_are_given_up():
    world = World(body_timeout_s=0.3)
    sent = run(send_body(world.app, [(0.1, body_part(b" ", True))] * 50))
    assert sent[0]["status"] == 408 and b"body_timeout" in sent[1]["body"]


def test_unknown_callers_are_answered_before_their_body():
    world = World()
    world.policy = Policy(keys=(Key(name="other", hash=hashed("x")),))
    assert run(send_body(world.app, []))[0]["status"] == 401


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_frees_the_place_and_the_engine(stream):
    async def scenario():
        world = World()
        world.engine.hangs = asyncio.Event()
        body = json.dumps(ask(stream=stream)).encode()
        await send_body(world.app, [(0, body_part(body, False)), (0.1, {"type": "http.disconnect"})])
        return world

    world = run(scenario())
    assert world.in_flight == 0 and world.engine.stopped == 1 and len(world.engine.orders) == 1
    assert 'status="499"} 1.0' in metrics(world)


def test_a_caller_who_leaves_mid_stream():
    async def scenario():
        world = World()
        world.engine.texts = ["x" * 300]
        body = json.dumps(ask(stream=True)).encode()
        sent = await send_body(world.app, [(0, body_part(body, False)), (0, {"type": "http.disconnect"})])
        return world, sent

    world, _ = run(scenario())
    assert world.in_flight == 0 and world.engine.stopped == 1


def test_task_that_is_cancelled_settles():
    """Ray Serve cancels the handler when the caller is gone."""

    async def scenario():
        world = World()
        world.engine.hangs = asyncio.Event()
        body = json.dumps(ask()).encode()
        task = asyncio.ensure_future(send_body(world.app, [(0, body_part(body, False))]))
        await asyncio.sleep(0.2)
        assert world.in_flight == 1
        task.cancel()
        await asyncio.wait({task})
        return world

    world = run(scenario())
    assert world.in_flight == 0 and world.engine.stopped == 1


def test_concurrent_requests_of_a_key_are_bounded():
    async def scenario():
        world = World(concurrent=1)
        world.engine.hangs = asyncio.Event()
        transport = httpx.ASGITransport(app=world.app)
        headers = {"Authorization": "Bearer ck-web"}
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            first = asyncio.ensure_future(client.post(CHAT, json=ask()))
            while not world.engine.orders:
                await asyncio.sleep(0.01)
            second = await client.post(CHAT, json=ask())
            world.engine.hangs.set()
            return (await first).status_code, second

    status, second = run(scenario())
    assert status == 200 and second.status_code == 429 and "concurrent=1" in second.json()["error"]["message"]


def test_page_and_description_agree_and_need_no_network(world):
    page, description = world.web.get("/docs").text, world.web.get("/openapi.json").json()
    assert set(description["paths"]) == {
        CHAT, "/v1/completions", "/v1/control", "/v1/control/scores", "/v1/models", "/v1/models/{model}", "/metrics", "/healthz",
    }  # fmt: skip
    for path in description["paths"]:
        assert path in page
    assert "control_strategy" in page and "https://" not in page and not re.search(r"<(script|link)", page)
