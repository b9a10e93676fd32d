"""An ingress with fake engines behind it, for tests of what reaches an engine and what comes back."""

from __future__ import annotations

import asyncio
import functools
import json
from collections import deque

from starlette.testclient import TestClient

from ctrlray.serve.desk import Desk
from ctrlray.serve.dial import Dial, Range
from ctrlray.serve.front import Front
from ctrlray.serve.policy import Key, Policy, hashed
from ctrlray.serve.prompts import Prompts
from ctrlray.serve.routes import create_app
from ctrlray.serve.served import Served
from tests.fakes import FakeEngine, dialled_tokenizer

DIAL = Dial((Range("safety", 5, 1, 5, 5), Range("helpfulness", 3, 1, 3, 2)))
tokenizer_of = functools.cache(dialled_tokenizer)
TOKENIZER = tokenizer_of(DIAL)
CONTEXT = 400
CHAT = "/v1/chat/completions"


class World:
    """One ingress, its fake engines, and a client for each key."""

    def __init__(
        self,
        judge=None,
        room=99,
        max_body_bytes=100_000,
        body_timeout_s=30.0,
        max_held_bytes=1_000_000,
        dial=DIAL,
        tokenizer=None,
        context=CONTEXT,
        engine=None,
        **limits,
    ) -> None:
        self.engine = engine or FakeEngine()
        self.start_engine = FakeEngine(["11 dull", "53 good", "xx"])
        prompts = Prompts(tokenizer or tokenizer_of(dial), dial, True, context)
        plain = Prompts(tokenizer_of(dial, coded=False), dial, False, CONTEXT)
        models = [
            Served("tiny", dial, prompts, self.engine, False, "exmate"),
            Served("tiny-start", dial, plain, self.start_engine, True, "start"),
        ]
        own = Key.model_validate({"name": "web", "hash": hashed("ck-web")} | limits)
        admin = Key(name="admin", hash=hashed("ck-admin"), completions=True, metrics=True)
        self.policy = Policy(keys=(own, admin))
        self.desk = Desk({m.name: room for m in models})
        self.problem = ""
        self.front = Front(models, lambda: self.policy, self.desk, judge, lambda: self.problem)
        self.app = create_app(self.front, max_body_bytes, body_timeout_s, max_held_bytes)
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


def run(coroutine, timeout_s=20):
    return asyncio.run(asyncio.wait_for(coroutine, timeout_s))


class _Unhurried(asyncio.SelectorEventLoop):
    """Its clock goes on only where it would wait for a timer."""

    def __init__(self):
        super().__init__()
        self._now, wait = 0.0, self._selector.select

        def select(timeout=None):
            found = wait(None if timeout is None else 0)
            if timeout and not found:
                self._now += timeout
            return found

        self._selector.select = select

    def time(self):
        return self._now


def unhurried(coroutine, timeout_s=20):
    """Run what only waits for timers: a slow machine delays nothing in it. Not for sockets or threads."""
    with asyncio.Runner(loop_factory=_Unhurried) as runner:
        return runner.run(asyncio.wait_for(coroutine, timeout_s))


async def until(happens):
    while not happens():
        await asyncio.sleep(0.01)


async def send_body(app, messages, headers=(), path=CHAT, key="ck-web"):
    """Drive the application by hand; messages are (delay in s, or an event, and ASGI message). Returns what it sent."""
    sent, waiting = [], deque(messages)

    async def receive():
        delay, message = waiting[0] if waiting else (60, None)
        await (delay.wait() if isinstance(delay, asyncio.Event) else asyncio.sleep(delay))
        if waiting:
            waiting.popleft()
        return message

    async def send(message):
        sent.append(message)

    pairs = [(b"content-type", b"application/json"), *headers]
    if key is not None:
        pairs.append((b"authorization", f"Bearer {key}".encode()))
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": pairs}
    await app(scope, receive, send)
    return sent


def body_part(content: bytes, more: bool = False):
    return {"type": "http.request", "body": content, "more_body": more}
