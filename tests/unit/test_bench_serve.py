"""The benchmark of the server: what its client measures of a stream, and what many answers make."""

from __future__ import annotations

import argparse
import asyncio
import json
from types import SimpleNamespace

import aiohttp
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import serve
from benchmarks.serve import Timed
from tests.e2e import served


def test_many_answers_by_hand():
    # the first token after 0.01 to 0.21 s, the other ten in one second; three answers end before they say anything
    answers = [Timed(i / 100, 1 + i / 100, 11, [0.1, 0.2 if i == 7 else 0.1]) for i in range(1, 22)]
    made = serve.point(answers + [Timed(0.0, 0.1, 1, [])] * 3, 3.0)
    assert made["requests_per_s"] == 8 and made["tokens_per_s"] == 78 and made["tokens"] == 234
    assert made["first_token_s"] == 0.11 and made["first_token_p95_s"] == pytest.approx(0.2)  # the twentieth of 21
    assert made["between_tokens_s"] == pytest.approx(0.1) and made["longest_gap_s"] == 0.2
    assert made["gap_s"] == made["gap_p95_s"] == 0.1 and made["tokens_per_message"] == 234 / 63


def test_what_the_client_measures():
    """Role at once, content after 0.1 s, the rest 0.3 s later."""

    def line(delta, **more):
        return b"data: " + json.dumps({"choices": [{"delta": delta}]} | more).encode() + b"\n\n"

    async def answer(request):
        assert (await request.json())["control"] == serve.LEVELS
        response = web.StreamResponse()
        await response.prepare(request)
        for pause_s, sent in ((0, line({"role": "assistant"})), (0.1, line({"content": "a"})), (0.3, line({"content": "b"}))):
            await asyncio.sleep(pause_s)
            await response.write(sent)
        await response.write(line({}, usage={"completion_tokens": 9}) + b"data: [DONE]\n\n")
        return response

    async def scenario():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            return await serve.ask(session, str(server.make_url("")).rstrip("/"), "key", "ctrlray", "Hi", 9)

    timed = asyncio.run(scenario())
    (gap_s,) = timed.gaps_s  # of the two contents alone; a client that is late at one is so much nearer to the next
    assert timed.first_s >= 0.1 and 0.4 - 1e-6 <= timed.first_s + gap_s <= timed.end_s + 1e-6 and timed.tokens == 9


def test_ratios_have_their_targets():
    def result(first_s, seconds):
        return [{1: serve.point([Timed(first_s, 1, 2, [0.1])] * 8, seconds)}]

    made = serve.figures({"ctrlray": result(0.2, 10), "vllm": result(0.1, 8)}, [1])
    judged = {f["name"]: (f["target"], f["measured"], f["met"]) for f in made if f["met"] is not None}
    assert judged == {
        "requests/s, ctrlray / vllm serve, 1 at once": (">= 0.9", 0.8, False),
        "time to first token, ctrlray / vllm serve, 1 at once": ("<= 1.15", 2.0, False),
    }
    ratios = [f["name"].partition(",")[0] for f in made if "ctrlray / vllm" in f["name"]]
    assert len(ratios) == 6 and {"95th percentile of the time to first token", "time between messages"} < set(ratios)
    assert len(made) == 6 + 2 * 10


class Ending:
    """A process that ends between a look at it and its killing, or is there for longer."""

    def __init__(self, ends):
        self.ends, self.killed = ends, False

    def is_running(self):
        return True

    def kill(self):
        if self.ends:
            raise psutil.NoSuchProcess(1)
        self.killed = True


def test_processes_that_end_by_themselves_meanwhile_are_no_error(monkeypatch):
    processes = [Ending(True), Ending(False)]
    serve.kill(processes)
    assert processes[1].killed
    server, children = object.__new__(served.Server), [Ending(True), Ending(False)]
    server.process = SimpleNamespace(pid=1, poll=lambda: None, send_signal=lambda signal: None, wait=lambda timeout_s: 0)
    monkeypatch.setattr(served.psutil, "Process", lambda pid: SimpleNamespace(children=lambda recursive: children))
    assert server.stop() == 0 and children[1].killed


def test_no_more_at_once_than_the_engines_hold():
    assert serve.at_once("1,64") == [1, 64]
    with pytest.raises(argparse.ArgumentTypeError, match="1 to 64"):
        serve.at_once("65")
