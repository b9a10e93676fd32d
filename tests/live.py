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

from tests.fakes import FakeEngine
from tests.ingress import TOKENIZER, World


class DialledEngine(FakeEngine):
    """A fake engine that says the levels which it was asked for, `52 ...`, and whatever follows, at a pace."""

    def __init__(self, says: str = " <b>bold</b> words", pace_s: float = 0.0) -> None:
        super().__init__()
        self.says = says
        self.pace_s = pace_s
        self.faults: list[dict[str, Any]] = []
        """Errors that the next orders end with."""

    async def answer(self, order: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        code = TOKENIZER.decode(order["prompt"][0]).rpartition("assistant")[2]
        self.texts = ["".join(re.findall(r":(\d)\|>", code)) + self.says]
        self.error = self.faults.pop(0) if self.faults else None
        async for batch in super().answer(order):
            yield batch
            await asyncio.sleep(self.pace_s)


@contextmanager
def listening(world: World) -> Iterator[str]:
    """The address of a world."""
    server = uvicorn.Server(uvicorn.Config(world.app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1))
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
