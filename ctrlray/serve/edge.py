"""A limit on how long request headers may take, inside of Ray Serve's own HTTP server, which has none; and its entrance.

Ray Serve calls `install` in each of its proxies when RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it; `ctrlray serve` sees to
that for a cluster of its own. Bodies are watched by `ctrlray.serve.guard`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.protocols.http.auto as chosen
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ctrlray.serve.entrance import Entrance

CALLBACK = "ctrlray.serve.edge:install"
HEADER_TIMEOUT_S = 20.0
MAX_HEADER_BYTES = 64 * 1024


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which closes a connection whose headers do not arrive in time, or are too long."""

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """The first request's time begins with the connection."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to headers."""
        if self._deadline is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._deadline is not None and self._header_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        """A further request on the same connection begins."""
        super().on_message_begin()
        if self._deadline is None:
            self._header_bytes = 0
            self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def on_headers_complete(self) -> None:
        """They came in time."""
        self._stop()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        self._stop()
        super().connection_lost(exc)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def install() -> list[Any]:
    """Have uvicorn use the protocol above; the middleware that requests pass first."""
    chosen.AutoHTTPProtocol = PatientProtocol  # Ray Serve passes no protocol to uvicorn, which then takes this one
    return [Middleware(Entrance)]
