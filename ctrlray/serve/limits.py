"""How much: token buckets and requests at once per key, and a bounded queue per model. Pure; the clock comes as an argument.

A request is admitted for all that it may take (prompt and longest answer), and gives back what it did not take when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ctrlray.serve.policy import Key

TICKET_LIFETIME_S = 3600.0
"""A request whose end nobody reported, because its ingress died, stops counting after this long."""
_FIRST_GUESS_S = 5.0
_LONGEST_WAIT_S = 60
_MEMORY = 0.9
"""Weight of the mean so far against the newest request's duration."""


@dataclass
class Bucket:
    """Lets `per_minute` through each minute, at most that much at once."""

    per_minute: int
    level: float
    at_s: float

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` is there; 0 when it is now, infinite when it never will be."""
        self._fill(now_s)
        if amount > self.per_minute:
            return math.inf
        return max(amount - self.level, 0.0) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        """Take what `wait_s` found to be there; a negative amount gives back."""
        self.level = min(self.level - amount, float(self.per_minute))

    def _fill(self, now_s: float) -> None:
        self.level = min(self.level + max(now_s - self.at_s, 0.0) * self.per_minute / 60, float(self.per_minute))
        self.at_s = now_s


class Asked(NamedTuple):
    """What a request wants of the limits."""

    ticket: str
    key: Key
    model: str
    tokens: int
    """Prompt and longest answer of all its choices."""


class Wait(NamedTuple):
    """Why a request is not admitted now. `retry_after_s` 0: it never will be."""

    message: str
    retry_after_s: int


@dataclass
class _Held:
    asked: Asked
    since_s: float


@dataclass
class Limits:
    """All requests in flight. `rooms` is how many a model may have at once, being answered and waiting together."""

    rooms: Mapping[str, int]
    _buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)
    _held: dict[str, _Held] = field(default_factory=dict)
    _mean_s: dict[str, float] = field(default_factory=dict)

    def admit(self, asked: Asked, now_s: float) -> Wait | None:
        """Take a request in, or say why not and when to come again."""
        self._forget(now_s)
        if wait := self._too_many_at_once(asked):
            return wait
        wanted = [
            (self._bucket(asked.key, "requests_per_minute", now_s), 1, "requests_per_minute"),
            (self._bucket(asked.key, "tokens_per_minute", now_s), asked.tokens, "tokens_per_minute"),
        ]
        for bucket, amount, name in wanted:
            if bucket is not None and (wait := _short(bucket, amount, name, now_s)):
                return wait
        for bucket, amount, _ in wanted:
            if bucket is not None:
                bucket.take(amount)
        self._held[asked.ticket] = _Held(asked, now_s)
        return None

    def settle(self, ticket: str, used_tokens: int, now_s: float) -> None:
        """A request ended; it took `used_tokens`. A ticket that is not known changes nothing."""
        held = self._held.pop(ticket, None)
        if held is None:
            return
        asked = held.asked
        bucket = self._bucket(asked.key, "tokens_per_minute", now_s)
        if bucket is not None:
            bucket.take(used_tokens - asked.tokens)
        before = self._mean_s.get(asked.model, now_s - held.since_s)
        self._mean_s[asked.model] = _MEMORY * before + (1 - _MEMORY) * (now_s - held.since_s)

    def in_flight(self, model: str | None = None, key: str | None = None) -> int:
        """Requests that were admitted and have not ended."""
        held = [h.asked for h in self._held.values()]
        return sum((model is None or a.model == model) and (key is None or a.key.name == key) for a in held)

    def _too_many_at_once(self, asked: Asked) -> Wait | None:
        soon = self._soon(asked.model)
        limit = asked.key.concurrent
        if limit is not None and self.in_flight(key=asked.key.name) >= limit:
            return Wait(f"concurrent={limit}: so many requests of your key are being answered; wait for one to end", soon)
        room = self.rooms[asked.model]
        if self.in_flight(model=asked.model) >= room:
            return Wait(f"the queue of {asked.model!r} is full ({room} requests); come again later", soon)
        return None

    def _soon(self, model: str) -> int:
        """Seconds in which a place may be free: the mean time that a request takes."""
        return min(max(math.ceil(self._mean_s.get(model, _FIRST_GUESS_S)), 1), _LONGEST_WAIT_S)

    def _bucket(self, key: Key, name: str, now_s: float) -> Bucket | None:
        limit: int | None = getattr(key, name)
        if limit is None:
            return None
        bucket = self._buckets.get((key.name, name))
        if bucket is None or bucket.per_minute != limit:  # a policy that changed starts anew
            bucket = self._buckets[(key.name, name)] = Bucket(limit, float(limit), now_s)
        return bucket

    def _forget(self, now_s: float) -> None:
        for ticket in [t for t, h in self._held.items() if now_s - h.since_s > TICKET_LIFETIME_S]:
            del self._held[ticket]


def _short(bucket: Bucket, amount: int, name: str, now_s: float) -> Wait | None:
    wait_s = bucket.wait_s(amount, now_s)
    if wait_s == 0:
        return None
    if math.isinf(wait_s):
        return Wait(f"{name}={bucket.per_minute}: this request alone may take {amount}; lower max_tokens or n", 0)
    return Wait(f"{name}={bucket.per_minute}: your key has used them up", math.ceil(wait_s))
