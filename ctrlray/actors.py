"""Pools of named actors that stay between calls: batches go to whichever is free, and one that ends is replaced.

rows -> batches -> free actors -> results, as they come
^            | one ends or raises: a new actor takes its place
└─ eighths <─┘ until the row that ends actors is alone and left out
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray

from ctrlray.config import Pool
from ctrlray.errors import ClusterError, ConfigError
from ctrlray.isolate import plan
from ctrlray.placement import on_nodes
from ctrlray.telemetry import current, record, warn


class Words(NamedTuple):
    """What a pool's messages call its parts, and the settings that they point to."""

    actor: str
    article: str
    rows: str
    restarts: str
    batch: str


class ActorPool:
    """Actors `<name>-0-0`, `<name>-1-0`, ... of one kind, which has `ready()`; use as a context manager.

    Each works on one batch at a time. `pool.max_restarts` bounds how often they are replaced in a row with no batch finished in
    between; an actor that ended on a part of a batch of which other rows are finished does not count. `restore(index)` gives
    a replacement what its predecessor had been given, before it gets work.
    """

    def __init__(
        self,
        kind: type,
        arguments: Sequence[Any],
        pool: Pool,
        name: str,
        words: Words,
        stall_timeout_s: float,
        restore: Callable[[int], None] = lambda index: None,
    ) -> None:
        self._kind, self._arguments, self._pool, self._name = kind, tuple(arguments), pool, name
        self._words, self._timeout_s, self._restore = words, stall_timeout_s, restore
        self._restarts = self._in_vain = 0
        self.greetings: list[Any] = []
        """What the first actors' `ready()` gave, once they are up."""
        self.actors = [self._start(i) for i in range(pool.max_size)]

    def _start(self, index: int) -> Any:
        placed = {"num_cpus": self._pool.cpus, "num_gpus": self._pool.gpus, "resources": on_nodes(self._pool.nodes)}
        actor = ray.remote(self._kind).options(name=f"{self._name}-{index}-{self._restarts}", max_restarts=0, **placed)
        return actor.remote(*self._arguments)

    def __enter__(self) -> ActorPool:
        """Wait until every actor is up."""
        try:
            self.greetings = self._await_start(self.actors)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the actors."""
        self.close()

    def run(
        self,
        num_rows: int,
        batch_size: int,
        submit: Callable[[Any, list[int]], Any],
        done: Callable[[list[int], Any], None],
    ) -> dict[int, str]:
        """Have rows 0 to `num_rows` - 1 worked on; returns those left out, each with what the actor that it ended said.

        `submit(actor, rows)` starts a batch on a free actor, `done(rows, result)` takes what came back. What ctrlray itself
        refuses in an actor is raised here. Raises ClusterError when too many actors end in a row, or nothing comes.
        """
        waiting = [list(range(i, min(i + batch_size, num_rows))) for i in range(0, num_rows, batch_size)]
        idle = list(range(len(self.actors)))
        running: dict[Any, tuple[list[int], int, Any]] = {}
        died: list[list[int]] = []
        left_out: dict[int, str] = {}
        sound: set[int] = set()  # batches, as they were first cut, of which rows are finished
        while waiting or running:
            while waiting and idle:
                batch, index = waiting.pop(0), idle.pop()
                running[submit(self.actors[index], batch)] = (batch, index, self.actors[index])
            answer = self._next(running)
            batch, index, actor = running.pop(answer)
            idle.append(index)
            try:
                with _unwrapped():
                    made = ray.get(answer)
            except _ENDED as error:
                if self.actors[index] is actor:  # else `heal` was first, while another one was replaced
                    self.replace(index, error, in_vain=batch[0] // batch_size not in sound)
                died.append(batch)
                again, killers = plan(batch, died)
                # what is left of a batch comes before the next one, and what is suspected least first, as in `plan`
                waiting = sorted(again + waiting, key=lambda group: (group[0] // batch_size, -len(group)))
                left_out |= dict.fromkeys(killers, last_line(error))
                continue
            done(batch, made)
            sound.add(batch[0] // batch_size)
            self._in_vain = 0
        return left_out

    def _next(self, running: dict[Any, tuple[list[int], int, Any]]) -> Any:
        done, _ = ray.wait(list(running), timeout=self._timeout_s)
        if done:
            return done[0]
        held = sum(len(batch) for batch, *_ in running.values())
        w = self._words
        raise ClusterError(
            f"{self._name}: no {w.actor} finished a batch within {self._timeout_s:g} s; {held} {w.rows} are in flight on "
            f"{len(running)} {w.actor}s. Raise cluster.stall_timeout_s or lower {w.batch}."
        )

    def ask(self, call: Callable[[Any], Any], indices: Sequence[int] | None = None) -> list[Any]:
        """Answers of all actors, or of some, to `call(actor)`; the error itself where one ended, raised, or was late.

        What ctrlray itself refuses in an actor is raised.
        """
        chosen = range(len(self.actors)) if indices is None else indices
        answers = [call(self.actors[i]) for i in chosen]
        deadline = time.monotonic() + self._timeout_s
        return [self._answer(a, deadline) for a in answers]

    def _answer(self, answer: Any, deadline: float) -> Any:
        try:
            with _unwrapped():
                return ray.get(answer, timeout=max(deadline - time.monotonic(), 0.0))
        except (*_ENDED, ray.exceptions.GetTimeoutError) as error:
            return error

    def begin(self, call: Callable[[Any, int], Any]) -> dict[Any, int]:
        """`call(actor, index)` on all actors at once; the answers to come, and whose each is."""
        return {call(actor, i): i for i, actor in enumerate(self.actors)}

    def arrived(self, answers: dict[Any, int]) -> dict[int, Any]:
        """Take out of `answers` those that are there: by actor, and as `ask` gives them."""
        done, _ = ray.wait(list(answers), num_returns=len(answers), timeout=0)
        return {answers.pop(answer): self._answer(answer, time.monotonic()) for answer in done}

    @property
    def replaced(self) -> int:
        """How many actors took another's place so far."""
        return self._restarts

    def heal(self) -> None:
        """Replace the actors that ended since they last had work."""
        for index, answer in enumerate(self.ask(lambda actor: actor.ready.remote())):
            if isinstance(answer, _ENDED):
                self.replace(index, answer)

    def replace(self, index: int, error: Exception, in_vain: bool = True) -> None:
        """A new actor in the place of one that ended or raised. Raises ClusterError when too many in a row ended in vain.

        One that ends before it is up is replaced in its turn: where a node went away, the cluster may have put it there.
        """
        self._restarts += 1
        self._in_vain += in_vain
        if self._in_vain > self._pool.max_restarts:
            raise ClusterError(
                f"{self._name}: {self._words.actor}s ended {self._in_vain} times in a row and finished nothing in between, more "
                f"than {self._words.restarts}={self._pool.max_restarts} allows; the last one with: {last_line(error)}"
            ) from error
        record(current(), "ctrlray_actor_restarts", 1, actor=self._words.actor)
        warn(current(), f"{self._words.actor} {index} of {self._name} ended: {last_line(error)}; starting another")
        ray.kill(self.actors[index])  # one that only raised is in an unknown state
        self.actors[index] = self._start(index)
        try:
            self._await_start([self.actors[index]])
        except ClusterError as failed:
            if not isinstance(failed.__cause__, GONE):
                raise
            return self.replace(index, failed.__cause__)
        self._restore(index)

    def _await_start(self, actors: Sequence[Any]) -> list[Any]:
        waiting = [a.ready.remote() for a in actors]
        try:
            with _unwrapped():
                return list(ray.get(waiting, timeout=self._timeout_s))
        except ray.exceptions.GetTimeoutError as error:
            late = len(ray.wait(waiting, num_returns=len(waiting), timeout=0)[1])
            free = ray.available_resources()
            raise ClusterError(
                f"{self._name}: {late} of {len(waiting)} {self._words.actor}s did not start within {self._timeout_s:g} s; each "
                f"reserves {self._pool.cpus:g} CPUs and {self._pool.gpus:g} GPUs, and {free.get('CPU', 0):g} CPUs and "
                f"{free.get('GPU', 0):g} GPUs are free"
            ) from error
        except _ENDED as error:
            one = f"{self._words.article} {self._words.actor}"
            raise ClusterError(f"{self._name}: {one} did not start: {last_line(error)}") from error

    def close(self) -> None:
        """Stop the actors' processes."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


GONE = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""An actor that is no more, or that Ray ended before the node's memory did."""
_ENDED = (*GONE, ray.exceptions.RayTaskError)
"""An actor that is gone, or that raised."""


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise what ctrlray itself refused in another process as it is: no actor's fault, and written for the user."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError | ClusterError):
            raise error.cause from error
        raise


def last_line(error: Exception) -> str:
    """What an error that came from another process says in the end: the exception there, below its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
