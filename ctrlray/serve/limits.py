"""How much: token buckets and requests at once per key, and a bounded queue per model. Pure; the clock comes as an argument.

A request is admitted for all that it may take (prompt and longest answer), and gives back what it did not take when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ctrlray.serve.policy import Key

K = TypeVar("K")
UNSEEN_S = 90.0
"""A request of which an ingress elsewhere says nothing for so long stops counting: its ingress died."""
WITHDRAWN_S = 60.0
"""For how long a withdrawn ticket that is not there yet is refused: a call to a desk may arrive after one that was made later."""
_MOST_WITHDRAWN = 10_000
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

    def spend(self, amount: float, now_s: float) -> None:
        """Take of `amount` what is there."""
        self._fill(now_s)
        self.level -= min(amount, max(self.level, 0.0))

    def resize(self, per_minute: int, now_s: float) -> None:
        """Another limit from now on. What is there stays, up to the new limit, so that changing to and fro fills nothing."""
        self._fill(now_s)
        self.per_minute, self.level = per_minute, min(self.level, float(per_minute))

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
    of_key: bool = True
    """Whether a limit of the caller's own key says so; not where the model's queue is full."""


@dataclass
class _Held:
    asked: Asked
    since_s: float
    seen_s: float


@dataclass
class Limits:
    """All requests in flight. `rooms` is how many a model may have at once, being answered and waiting together."""

    rooms: Mapping[str, int]
    unseen_s: float = math.inf
    """After how long without a `renew` a request stops counting; never where its ingress is this process."""
    _buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)
    _held: dict[str, _Held] = field(default_factory=dict)
    _withdrawn: dict[str, float] = field(default_factory=dict)
    """Tickets that were not there, the oldest first, and when they were withdrawn."""
    _mean_s: dict[str, float] = field(default_factory=dict)

    def admit(self, asked: Asked, now_s: float) -> Wait | None:
        """Take a request in, or say why not and when to come again."""
        self._forget(now_s)
        if self._withdrawn.pop(asked.ticket, None) is not None:
            return Wait("the request was withdrawn before it came in; send it again", 1, of_key=False)
        if wait := self._too_many_at_once(asked):
            return wait
        wanted = [
            (self._bucket(asked.key, "requests_per_minute", now_s), 1, "requests_per_minute"),
            (self._bucket(asked.key, "tokens_per_minute", now_s), asked.tokens, "tokens_per_minute"),
        ]
        for bucket, amount, name in wanted:
            if bucket is not None and (wait := _short(bucket, amount, name, now_s)):
                return wait
        if wait := self._queue_full(asked.model):  # last: what the key's own limits say, the caller can mend
            return wait
        for bucket, amount, _ in wanted:
            if bucket is not None:
                bucket.take(amount)
        self._held[asked.ticket] = _Held(asked, now_s, now_s)
        return None

    def settle(self, ticket: str, used_tokens: int, now_s: float) -> None:
        """A request ended; it took `used_tokens`. A ticket that is not known changes nothing."""
        held = self._held.pop(ticket, None)
        if held is None:
            return
        asked = held.asked
        self._return_tokens(asked, used_tokens)
        before = self._mean_s.get(asked.model, now_s - held.since_s)
        self._mean_s[asked.model] = _MEMORY * before + (1 - _MEMORY) * (now_s - held.since_s)

    def renew(self, tickets: Iterable[str], now_s: float) -> None:
        """These are still being answered."""
        for held in filter(None, map(self._held.get, tickets)):
            held.seen_s = now_s

    def withdraw(self, ticket: str, now_s: float) -> None:
        """Nobody waits for this request any more, and no engine has seen it: it frees its place and took no tokens.

        One that is not there is refused when it comes. It still counts as a request of its key, as one whose caller leaves does.
        """
        held = self._held.pop(ticket, None)
        if held is not None:
            self._return_tokens(held.asked, 0)
            return
        self._forget(now_s)
        self._withdrawn[ticket] = now_s
        if len(self._withdrawn) > _MOST_WITHDRAWN:
            del self._withdrawn[next(iter(self._withdrawn))]

    def in_flight(self, model: str | None = None, key: str | None = None) -> int:
        """Requests that were admitted and have not ended."""
        held = [h.asked for h in self._held.values()]
        return sum((model is None or a.model == model) and (key is None or a.key.name == key) for a in held)

    def _return_tokens(self, asked: Asked, used_tokens: int) -> None:
        if asked.key.tokens_per_minute is not None:  # else it took none; the limit may be another by now, and stays so
            self._buckets[(asked.key.name, "tokens_per_minute")].take(used_tokens - asked.tokens)

    def _too_many_at_once(self, asked: Asked) -> Wait | None:
        limit = asked.key.concurrent
        if limit is not None and self.in_flight(key=asked.key.name) >= limit:
            message = f"concurrent={limit}: so many requests of your key are being answered; wait for one to end"
            return Wait(message, self._soon(asked.model))
        return None

    def _queue_full(self, model: str) -> Wait | None:
        room = self.rooms[model]
        if self.in_flight(model=model) < room:
            return None
        return Wait(f"the queue of {model!r} is full ({room} requests); come again later", self._soon(model), of_key=False)

    def _soon(self, model: str) -> int:
        """Seconds in which a place may be free: the mean time that a request takes."""
        return min(max(math.ceil(self._mean_s.get(model, _FIRST_GUESS_S)), 1), _LONGEST_WAIT_S)

    def _bucket(self, key: Key, name: str, now_s: float) -> Bucket | None:
        limit: int | None = getattr(key, name)
        return None if limit is None else _kept(self._buckets, (key.name, name), limit, now_s)

    def _forget(self, now_s: float) -> None:
        for ticket in [t for t, h in self._held.items() if now_s - h.seen_s > self.unseen_s]:
            del self._held[ticket]
        while self._withdrawn and now_s - self._withdrawn[oldest := next(iter(self._withdrawn))] > WITHDRAWN_S:
            del self._withdrawn[oldest]


@dataclass
class Faults:
    """Requests of each key that were refused for what they are: as many a minute as the key's requests_per_minute."""

    _buckets: dict[str, Bucket] = field(default_factory=dict)

    def check(self, key: Key, now_s: float) -> Wait | None:
        """Why the key's next request is not even read, or None."""
        limit = key.requests_per_minute
        if limit is None or (wait_s := _kept(self._buckets, key.name, limit, now_s).wait_s(1, now_s)) == 0:
            return None
        message = f"requests_per_minute={limit}: so many requests of your key were refused; mend them or wait"
        return Wait(message, math.ceil(wait_s))

    def count(self, key: Key, now_s: float) -> None:
        """One more was refused. Many at once make the wait no longer than one does."""
        if key.requests_per_minute is not None:
            _kept(self._buckets, key.name, key.requests_per_minute, now_s).spend(1, now_s)


def _kept(buckets: dict[K, Bucket], name: K, limit: int, now_s: float) -> Bucket:
    """The bucket of this name, full if it is new, and with the limit that holds now."""
    bucket = buckets.setdefault(name, Bucket(limit, float(limit), now_s))
    if bucket.per_minute != limit:
        bucket.resize(limit, now_s)
    return bucket


def _short(bucket: Bucket, amount: int, name: str, now_s: float) -> Wait | None:
    wait_s = bucket.wait_s(amount, now_s)
    if wait_s == 0:
        return None
    if math.isinf(wait_s):
        return Wait(f"{name}={bucket.per_minute}: this request alone may take {amount}; lower max_tokens or n", 0)
    return Wait(f"{name}={bucket.per_minute}: your key has used them up", math.ceil(wait_s))
