"""Small tasks beside the requests: what one of them waits for or meets neither delays nor fails a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

_LOG = logging.getLogger(__name__)
_running: set[asyncio.Task[None]] = set()
"""asyncio itself does not keep tasks alive."""


def aside(work: Awaitable[None]) -> None:
    """Do this beside what runs now; an error of it is logged."""
    task = asyncio.create_task(_logged(work))
    _running.add(task)
    task.add_done_callback(_running.discard)


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except Exception as error:
        _LOG.warning("a task beside the requests failed: %r", error)
