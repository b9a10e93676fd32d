"""The one place that counts: limits over all requests, and metrics. Beside the ingress, or for several of them a deployment."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from ctrlray.serve.limits import Asked, Limits, Wait

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Outcome(NamedTuple):
    """How a request that was admitted ended."""

    ticket: str
    key: str
    """The key's name."""
    model: str
    status: int
    """HTTP status; 499 when the caller left."""
    levels: Mapping[str, int]
    """In force; empty for plain completions."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    first_token_s: float | None
    """None when no token came."""
    uncounted_tokens: int = 0
    """Kept of what was set aside, beside the tokens that are known: of an answer that may have been made and was not counted."""


class Counts(Protocol):
    """What the ingress asks of a desk, wherever it is."""

    async def admit(self, asked: Asked) -> Wait | None:
        """Take a request in, or say why not. Where this ends with an error, the request holds nothing."""
        ...

    async def settle(self, outcome: Outcome) -> None:
        """A request that was admitted has ended."""
        ...

    async def withdraw(self, ticket: str) -> None:
        """Nobody waits for this request's admission any more, whether it was given, is being given or comes later."""
        ...

    async def refused(self, key: str, status: int) -> None:
        """A request was refused before it reached an engine."""
        ...

    async def metrics(self) -> bytes:
        """Prometheus text."""
        ...


class Desk:
    """Limits and metrics in this process.

    Metrics by level have no key as a label: their series are as many as models, attributes, levels and statuses make.
    """

    def __init__(self, rooms: Mapping[str, int], unseen_s: float = math.inf) -> None:
        self._limits = Limits(rooms, unseen_s)
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        level = ("model", "attribute", "level")
        self._requests = Counter("ctrlray_requests", "Requests answered", ("model", "key", "status"), **own)
        self._refused = Counter("ctrlray_refused", "Requests refused before an engine saw them", ("key", "status"), **own)
        self._tokens = Counter("ctrlray_tokens", "Tokens", ("model", "key", "kind"), **own)
        self._level_requests = Counter(
            "ctrlray_level_requests", "Requests answered by level in force, once for each attribute", (*level, "status"), **own
        )
        self._level_tokens = Counter(
            "ctrlray_level_tokens", "Tokens of answers by level in force, once for each attribute", level, **own
        )
        self._seconds = Histogram(
            "ctrlray_request_seconds",
            "Time to the end of an answer by level in force, once for each attribute",
            level,
            buckets=_SECONDS,
            **own,
        )
        self._first = Histogram(
            "ctrlray_first_token_seconds", "Time to the first token of a stream", ("model",), buckets=_SECONDS, **own
        )
        self._level_first = Histogram(
            "ctrlray_level_first_token_seconds",
            "Time to the first token of a stream by level in force, once for each attribute",
            level,
            buckets=_SECONDS,
            **own,
        )

    async def admit(self, asked: Asked) -> Wait | None:
        """Take a request in, or say why not."""
        return self._limits.admit(asked, time.monotonic())

    async def settle(self, outcome: Outcome) -> None:
        """A request that was admitted has ended."""
        model, key = outcome.model, outcome.key
        used = outcome.prompt_tokens + outcome.completion_tokens + outcome.uncounted_tokens
        self._limits.settle(outcome.ticket, used, time.monotonic())
        self._requests.labels(model, key, outcome.status).inc()
        self._tokens.labels(model, key, "prompt").inc(outcome.prompt_tokens)
        self._tokens.labels(model, key, "completion").inc(outcome.completion_tokens)
        for attribute, level in outcome.levels.items():
            self._level_requests.labels(model, attribute, level, outcome.status).inc()
            self._level_tokens.labels(model, attribute, level).inc(outcome.completion_tokens)
            self._seconds.labels(model, attribute, level).observe(outcome.seconds)
        if outcome.first_token_s is not None:
            self._first.labels(model).observe(outcome.first_token_s)
            for attribute, level in outcome.levels.items():
                self._level_first.labels(model, attribute, level).observe(outcome.first_token_s)

    async def renew(self, tickets: Sequence[str]) -> None:
        """Requests of an ingress elsewhere that are still being answered."""
        self._limits.renew(tickets, time.monotonic())

    async def withdraw(self, ticket: str) -> None:
        """Nobody waits for this request's admission any more; it is in no metric."""
        self._limits.withdraw(ticket, time.monotonic())

    async def refused(self, key: str, status: int) -> None:
        """A request was refused before it reached an engine."""
        self._refused.labels(key, status).inc()

    async def metrics(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)
