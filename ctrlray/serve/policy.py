"""The operator's policy: who may call, what the dial may be set to, and how much. A YAML file, read again when it changes.

    keys:
      - name: web
        hash: "sha256:..."            # `ctrlray serve key` prints a new key and its hash
        attributes: {safety: {low: 2, high: 3, default: 3}}
        requests_per_minute: 60

Keys are 256 random bits, so a plain SHA-256 of one cannot be searched; made-up passwords have no place here.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ctrlray.config import Frozen, parse, read_job
from ctrlray.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
_LOG = logging.getLogger(__name__)
SETTLED_S = 1.0
"""A policy file that changed less than this ago may still be being written, and is not read yet."""
AGAIN_S = 30.0
"""Between tries to read one that is not in force."""
_PREFIX = "ck-"
_BYTES = 32


class Bounds(Frozen):
    """What a key may set of one attribute; the model's own range and default where unset."""

    low: Annotated[int, Field(ge=1, le=10)] | None = None
    high: Annotated[int, Field(ge=1, le=10)] | None = None
    default: Annotated[int, Field(ge=1, le=10)] | None = None
    """Level in force when a request names none; the model's own, moved inside of the bounds, when unset."""


class Key(Frozen):
    """One caller and its limits; a limit that is unset does not bind."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Appears in metrics and logs, where the key itself never does."""
    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    """Of a key that `ctrlray serve key` made."""
    models: tuple[str, ...] | None = None
    """Names of the models it may use."""
    attributes: dict[str, Bounds] = Field(default_factory=dict)
    out_of_bounds: Literal["refuse", "clamp"] = "refuse"
    """What becomes of a level or a max_tokens outside of the bounds: 403 naming the bound, or the nearest one inside."""
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    """Prompt and answer together; a request is admitted for all that it may take, and what it did not take is given back."""
    max_tokens: Count | None = None
    """Of one answer."""
    concurrent: Count | None = None
    """Requests at once, streams among them."""
    choices: Annotated[int, Field(ge=1, le=128)] = 16
    """Most answers of one request: its `n` for each of its prompts, and the candidates of a reranked answer."""
    completions: bool = False
    """Whether it may use /v1/completions, which knows no dial."""
    metrics: bool = False
    """Whether it may read /metrics, which shows the names and the traffic of all keys."""


class Policy(Frozen):
    """All callers."""

    keys: Annotated[tuple[Key, ...], Field(min_length=1)]
    metrics: Literal["key", "open"] = "key"
    """Who may read /metrics: keys with `metrics: true`, or everybody."""

    @field_validator("keys")
    @classmethod
    def _differ(cls, value: tuple[Key, ...]) -> tuple[Key, ...]:
        for what, found in (("name", [k.name for k in value]), ("hash", [k.hash for k in value])):
            if twice := sorted(v for v in set(found) if found.count(v) > 1):
                raise ValueError(f"two keys have the {what} {twice[0]!r}; give each its own")
        return value

    def find(self, presented: str) -> Key | None:
        """Whose key this is. Takes as long whether it is the first, the last or nobody's."""
        digest = hashed(presented)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found


def mint() -> tuple[str, str]:
    """A new key and its hash."""
    key = _PREFIX + secrets.token_urlsafe(_BYTES)
    return key, hashed(key)


def hashed(key: str) -> str:
    """`sha256:<hex>` of a key."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def local_policy() -> tuple[str, Policy]:
    """One new key that may do everything, and the policy that knows it."""
    key, digest = mint()
    return key, Policy(keys=(Key(name="local", hash=digest, completions=True, choices=128, metrics=True),))


def read_policy(path: Path) -> Policy:
    """The policy of a file. Raises ConfigError."""
    return parse(Policy, read_job(path, what="policy file"), where=str(path))


class PolicyFile:
    """A policy file that is read again when it changes; one that got broken leaves the last good policy in force.

    `say` is told when that happens, and when the file is good again.
    """

    def __init__(
        self,
        path: Path,
        check: Callable[[Policy], None] = lambda policy: None,
        say: Callable[[str], None] = _LOG.warning,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._check = check
        self._say = say
        self._clock = clock
        self._taken = self._last = self._stamp()
        self._last_s = clock()
        self._policy = self._read()
        self._tried_s = self._last_s
        self.problem = ""
        """Why the file as it is now is not in force; empty when it is."""

    @property
    def policy(self) -> Policy:
        """What is in force now."""
        stamp = self._stamp()
        if stamp != self._last:
            self._last, self._last_s = stamp, self._clock()
        if stamp != self._taken and self._unchanged_s() >= SETTLED_S:
            self._taken = stamp
            self._take()
        elif self.problem and stamp == self._taken and self._clock() - self._tried_s >= AGAIN_S:  # storage may be well again
            self._take()
        return self._policy

    def _take(self) -> None:
        before, self._tried_s = self.problem, self._clock()
        try:
            self._policy, self.problem = self._read(), ""
        except ConfigError as error:
            self._refuse(str(error))
        except Exception as error:  # whatever a file makes the reader raise: requests are asking, and the gauge must tell
            self._refuse(f"{self._path}: {type(error).__name__}: {error}")
        if before and not self.problem:
            self._say(f"the policy file is in force again: {self._path}")

    def _refuse(self, problem: str) -> None:
        if problem == self.problem:
            return
        self.problem = problem
        self._say(f"the policy file is not in force, the policy of before stays: {problem}")

    def _unchanged_s(self) -> float:
        """For how long the file has been as it is: since it was seen so first, or longer by its own time."""
        written_s = self._last[0] / 1e9
        return self._clock() - (min(self._last_s, written_s) if written_s else self._last_s)

    def _read(self) -> Policy:
        policy = read_policy(self._path)
        self._check(policy)
        return policy

    def _stamp(self) -> tuple[int, ...]:
        """Changes with content and rights, also of a mounted file that is a link to a link; zeros where there is no file."""
        try:
            found = os.stat(self._path)
        except OSError:
            return (0, 0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns)
