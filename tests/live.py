"""An ingress with fake engines behind it on a port of this machine, for clients that need an address: browsers, SDKs, curl."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ctrlray.serve.dial import Dial
from ctrlray.serve.refusal import Refusal
from tests.fakes import FakeEngine
from tests.ingress import DIAL, World, tokenizer_of


class DialledEngine(FakeEngine):
    """A fake engine that says the levels which it was asked for, `52 ...`, and whatever follows, at a pace."""

    def __init__(self, says: str = " <b>bold</b> words", pace_s: float = 0.0, dial: Dial = DIAL) -> None:
        super().__init__()
        self.says = says
        self.pace_s = pace_s
        self.dial = dial
        self.faults: list[dict[str, Any] | Refusal | None] = []
        """What the next orders end with: an error of the engine, a Refusal as of a full queue, or, where None, an answer."""

    async def answer(self, order: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        code = tokenizer_of(self.dial).decode(order["prompt"][0]).rpartition("assistant")[2]
        self.texts = ["".join(re.findall(r":(\d)\|>", code)) + self.says]
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Refusal):
            raise fault
        self.error = fault
        async for batch in super().answer(order):
            yield batch
            await asyncio.sleep(self.pace_s)


@contextmanager
def listening(world: World, port: int = 0) -> Iterator[str]:
    """The address of a world, at any free port if none is given."""
    settings: dict[str, Any] = {"host": "127.0.0.1", "port": port, "log_config": None, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(world.app, **settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
