"""A served model end to end: Ray Serve, vLLM, the policy, and clients that know nothing of ctrlray."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter

import openai
import pytest
import yaml

from ctrlray.control import ControlSpace
from ctrlray.serve.policy import mint
from tests.browser import expect
from tests.e2e.served import Server, make_run
from tests.fuzzing import broken, seeds
from tests.playground import achieved, answers, ended, opened, slider
from tests.playground import ask as ask_on_the_page
from tests.snippets import run_snippet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CHAT = "/v1/chat/completions"
BODIES = 200
ADMIN, ADMIN_HASH = mint()
WEB, WEB_HASH = mint()
BRIEF, BRIEF_HASH = mint()
FUZZ, FUZZ_HASH = mint()


def policy(**web):
    own = {"name": "web", "hash": WEB_HASH, "attributes": {"variety": {"low": 2}}} | web
    admin = {"name": "admin", "hash": ADMIN_HASH, "completions": True, "choices": 64, "metrics": True}
    brief = {"name": "brief", "hash": BRIEF_HASH, "max_tokens": 20}
    fuzz = {"name": "fuzz", "hash": FUZZ_HASH, "max_tokens": 20, "choices": 4, "completions": True, "concurrent": 4}
    return yaml.safe_dump({"keys": [admin, own, brief, fuzz]})


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory, private_cache):
    return make_run(tiny, tmp_path_factory.mktemp("served") / "run")


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "policy.yaml"
    file.write_text(policy())
    return file


@pytest.fixture(scope="module")
def server(run, policy_file, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    settings = ("rewards=true", "engine.max_num_seqs=1", "max_context=2048", "ingress.body_timeout_s=3")
    made = Server(run, policy_file, log, *settings)
    try:
        made.wait()
        yield made
    finally:
        status = made.stop()
    assert status == 0 and "stopping" in log.read_text()


@pytest.fixture
def admin(server):
    with server.client(ADMIN) as client:
        yield client


@pytest.fixture
def web(server):
    with server.client(WEB) as client:
        yield client


def ask(text="Hello <|brevity:2|> there", **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0} | fields


def metric(client, start: str) -> float:
    found = [line for line in client.get("/metrics").text.splitlines() if line.startswith(start)]
    return sum(float(line.split()[-1]) for line in found)


def test_the_engine_gets_as_many_tokens_as_the_renderer_makes(run, admin):
    render = run.base.renderer(ControlSpace.of(run.job.control)).render
    answer = admin.post(CHAT, json=ask(control={"brevity": 2, "variety": 1})).json()
    assert answer["control"] == {"brevity": 2, "variety": 1}
    assert answer["usage"]["prompt_tokens"] == len(render([{"role": "user", "content": "Hello <|brevity:2|> there"}], (2, 1)))
    assert answer["usage"]["completion_tokens"] == 16 and answer["choices"][0]["finish_reason"] == "length"


def test_stream_and_whole_answer_are_the_same_text(admin):
    whole = admin.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"]
    with admin.stream("POST", CHAT, json=ask(stream=True)) as answer:
        assert answer.headers["X-Control"] == "brevity=1, variety=2"
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and chunks[0]["control"] == {"brevity": 1, "variety": 2}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole


def test_openai_client(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=WEB)
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=5,
        n=2,
        logprobs=True,
        top_logprobs=3,
        extra_body={"control": {"brevity": 2}},
    )
    assert answer.control == {"brevity": 2, "variety": 2} and len(answer.choices) == 2
    logprobs = answer.choices[0].logprobs.content
    assert len(logprobs[0].top_logprobs) == 3 and all(t.logprob <= 0 for t in logprobs)
    messages = [{"role": "user", "content": "Hi"}]
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, **streaming))
    assert chunks[0].control == {"brevity": 1, "variety": 2} and chunks[-1].usage.completion_tokens > 0
    with pytest.raises(openai.PermissionDeniedError, match="variety=1"):
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"control": {"variety": 1}})
    with pytest.raises(openai.BadRequestError, match="chat_template"):
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"chat_template": "x"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="ck-wrong").models.list()


NAMES = {"quickstart": "tiny", 'safety": 5': 'brevity": 2', "safety": "brevity"}
"""What stands in the page's snippets, and in its place here, where an attribute has two levels."""


def tokens_at(client, level):
    """Tokens so far of answers at a level of brevity."""
    return metric(client, f'ctrlray_level_tokens_total{{attribute="brevity",level="{level}",model="tiny"}}')


@pytest.mark.parametrize("name, level", [("openai", 2), ("openai-stream", 1), ("langchain", 2), ("curl", 2), ("curl-header", 2)])
def test_snippets_of_the_page(server, admin, name, level):
    tokens = 'ctrlray_tokens_total{key="brief",kind="completion",model="tiny"}'
    before = tokens_at(admin, level), metric(admin, tokens)
    said = run_snippet(name, server.url, BRIEF, NAMES)
    spent = metric(admin, tokens) - before[1]
    assert 0 < spent <= 20 and tokens_at(admin, level) - before[0] == spent
    if name == "openai":
        assert said.endswith("\n{'brevity': 2, 'variety': 2}\n")
    if name.startswith("curl"):
        answer = json.loads(said)
        assert answer["control"] == {"brevity": 2, "variety": 2} and answer["usage"]["completion_tokens"] == spent


def test_snippet_of_what_may_be_set(server):
    described = json.loads(run_snippet("control", server.url, WEB, NAMES))["data"][0]
    assert [(a["name"], a["low"], a["high"]) for a in described["attributes"]] == [("brevity", 1, 2), ("variety", 2, 2)]


WATCH = """() => {
  window.grown = [];
  const watch = () => {
    const text = document.querySelector("#view-chat .answer .text");
    if (text?.textContent) window.grown.push([...text.textContent].length);
  };
  new MutationObserver(watch).observe(document.querySelector("#view-chat"), { childList: true, subtree: true });
}"""
"""Keeps how long the answer was each time that it grew."""


def test_the_playground_streams_and_scores(server, browser, admin):
    with opened(browser, server.url, WEB) as page:
        slider(page, "brevity").focus()
        page.keyboard.press("End")
        expect(slider(page, "variety")).to_be_disabled()  # the key allows one level
        page.locator("#more summary").click()
        page.fill("#max-tokens", "200")
        page.fill("#temperature", "0")
        page.evaluate(WATCH)
        ask_on_the_page(page, "Hello")
        ended(page)
        assert answers(page).get_attribute("aria-label") == "Dial at brevity 2, variety 2"
        expect(answers(page).locator(".facts")).to_contain_text("200 tokens")
        said, grown = answers(page).locator(".text").text_content(), page.evaluate("window.grown")
        assert grown == sorted(grown) and len(set(grown)) > 3 and grown[-1] == len(said)
        shown = [float(text) for text in achieved(page)]
    whole = admin.post(CHAT, json=ask("Hello", control={"brevity": 2}, max_tokens=200)).json()["choices"][0]["message"]["content"]
    assert said == whole
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "answer": said}
    scored = admin.post("/v1/control/scores", json=body).json()["achieved"]
    assert shown == pytest.approx([scored["brevity"], scored["variety"]], abs=0.051)


def test_chat_in_a_terminal(server, admin):
    command = [sys.executable, "-m", "ctrlray", "chat", server.url, "--temperature", "0", "--max-tokens", "20"]
    environment = os.environ | {"CTRLRAY_API_KEY": WEB}
    before = tokens_at(admin, 2)
    done = subprocess.run(command, input="/brevity 2\nHello\n", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tokens_at(admin, 2) - before == 20
    whole = admin.post(CHAT, json=ask("Hello", control={"brevity": 2}, max_tokens=20)).json()["choices"][0]["message"]["content"]
    dial, _, said = done.stdout.partition("\n")
    assert dial == "brevity 2, variety 2" and re.sub(r"[^ -~]", "�", said) == re.sub(r"[^ -~]", "�", f"{whole}\n")


def test_json_mode(admin):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = admin.post(CHAT, json=ask(response_format=form, max_tokens=200)).json()
    assert json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
    assert admin.post(CHAT, json=ask(response_format=bad)).status_code in (200, 400)
    assert admin.post(CHAT, json=ask()).status_code == 200  # the engine lives on


def test_stop_and_plain_completions(admin):
    answer = admin.post("/v1/completions", json={"model": "tiny", "prompt": "Once", "max_tokens": 4, "temperature": 0}).json()
    text = answer["choices"][0]["text"]
    stopped = {"model": "tiny", "prompt": "Once", "max_tokens": 4, "temperature": 0, "stop": [text[1]]}
    assert admin.post("/v1/completions", json=stopped).json()["choices"][0]["finish_reason"] == "stop"


def test_rerank_by_the_runs_rewards(admin):
    asked = ask(control_strategy="rerank", candidates=6, temperature=1.0, max_tokens=12, n=3)
    choices = admin.post(CHAT, json=asked | {"control": {"brevity": 1, "variety": 2}}).json()["choices"]

    def far(achieved):
        return abs(achieved["brevity"] - 1) + abs(achieved["variety"] - 2)

    distances = [far(c["achieved"]) for c in choices]
    assert distances == sorted(distances)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "answer": choices[0]["message"]["content"]}
    assert admin.post("/v1/control/scores", json=body).json()["achieved"] == choices[0]["achieved"]


def test_stock_routes_and_serves_own_lead_nowhere(admin):
    for path in ("/tokenize", "/v1/embeddings", "/v1/score", "/metrics/engine"):
        assert admin.post(path, json={"prompt": "x"}).status_code == 404
    assert admin.get("/-/routes").status_code == 404 and admin.get("/-/healthz").status_code == 200


@pytest.mark.parametrize("name", ["X-Request-ID", "X-Session-Id", "serve_multiplexed_model_id", "x-request-timeout-seconds"])
def test_headers_cannot_steer_or_break_the_proxy(admin, name):
    assert admin.get("/v1/models", headers={name: b"\xff"}).status_code == 200


def test_a_caller_who_leaves_frees_the_engine(admin):
    """The engine holds one request; the next one is answered long before the one that was left would have ended."""
    begun = time.monotonic()
    assert admin.post(CHAT, json=ask(max_tokens=300)).json()["choices"][0]["finish_reason"] == "length"
    per_token = (time.monotonic() - begun) / 300
    left = metric(admin, 'ctrlray_requests_total{key="admin",model="tiny",status="499"}')
    with admin.stream("POST", CHAT, json=ask(max_tokens=1900, stream=True)) as answer:
        next(answer.iter_lines())
    begun = time.monotonic()
    assert admin.post(CHAT, json=ask(max_tokens=1)).status_code == 200
    assert time.monotonic() - begun < 1900 * per_token * 0.7
    assert metric(admin, 'ctrlray_requests_total{key="admin",model="tiny",status="499"}') == left + 1


def connection(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def test_no_broken_body_makes_the_engine_fail_or_keeps_a_place(server):
    good, dice = seeds("tiny", "tiny", {"brevity": 2, "variety": 1.4}, "Yes."), random.Random(11)
    statuses = Counter()
    with server.client(FUZZ) as client:
        for _ in range(BODIES):
            path, content = broken(dice, good)
            answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 403, 404) and "engine_error" not in answer.text, (answer.text, content)
            statuses[answer.status_code] += 1
    assert statuses[200] > BODIES / 20 and statuses[400] > BODIES / 4


def test_bodies_that_are_long_or_slow_are_refused(server, web):
    assert web.post(CHAT, content=b" " * 10_000_000).status_code == 413
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {WEB}\r\nContent-Length: 100\r\n\r\n"
    with connection(server) as slow:
        slow.sendall(head.encode() + b"{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.soak
def test_headers_that_trickle_in_are_given_up(server):
    with connection(server) as slow:
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < 40:
                slow.sendall(b"G" if time.monotonic() - begun < 1 else b"")
                slow.settimeout(1)
                try:
                    if slow.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
        except ConnectionError:
            pass
        assert 15 < time.monotonic() - begun < 35


def test_policy_is_read_again(server, policy_file, web, admin):
    def put(text):
        policy_file.write_text(text)
        assert web.get("/v1/models").status_code == 200  # the replica sees that the file has changed
        time.sleep(1.5)  # it takes a file that is left alone

    def told(text):
        end = time.monotonic() + 10
        while f"policy   the policy file is {text}" not in server.said():
            assert time.monotonic() < end, server.said()
            time.sleep(0.2)

    assert web.post(CHAT, json=ask(max_tokens=2)).status_code == 200
    put(policy(max_tokens=1))
    assert web.post(CHAT, json=ask(max_tokens=2)).status_code == 403
    put("keys: nonsense")
    assert web.post(CHAT, json=ask(max_tokens=2)).status_code == 403
    assert metric(admin, "ctrlray_policy_file_broken") == 1
    told("not in force, the policy of before stays")
    put(policy())
    assert web.post(CHAT, json=ask(max_tokens=2)).status_code == 200
    assert metric(admin, "ctrlray_policy_file_broken") == 0
    told("in force again")


@pytest.mark.soak
def test_replica_killed_mid_stream_ends_it_cleanly_and_comes_back(server, admin):
    (replica,) = server.replicas()
    with admin.stream("POST", CHAT, json=ask(max_tokens=1900, stream=True)) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        replica.kill()
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert first.startswith("data: ") and rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["error"]["code"] == "engine_error"
    end = time.monotonic() + 400
    while admin.post(CHAT, json=ask(max_tokens=2), timeout=400).status_code != 200:
        assert time.monotonic() < end
        time.sleep(2)
