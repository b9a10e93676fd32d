"""A persistent pool of named engine actors: started once, kept across weight updates, shared by what runs in a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray

from ctrlray.config import Pool, Sampling
from ctrlray.engine.engine import Completion, Engine, EngineSpec
from ctrlray.errors import ClusterError
from ctrlray.isolate import plan


class EngineHost:
    """One engine in a process of its own."""

    def __init__(self, spec: EngineSpec) -> None:
        os.environ.update(spec.environment())
        self._engine = Engine(spec)

    def ready(self) -> int:
        """Answers once the engine is up."""
        return os.getpid()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One answer per prompt."""
        return [samples[0] for samples in self._engine.generate(prompts, sampling)]

    def load_weights(self, folder: str, version: int) -> tuple[int, dict[str, float]]:
        """Swap weights; returns the version and checksums now in force."""
        self._engine.load_weights(folder, version)
        return self._engine.weights_version, self._engine.checksum()


class EnginePool:
    """Engines `<name>-0`, `<name>-1`, ...; use as a context manager.

    An engine that dies or raises is replaced, given the current weights, and its rows are tried again in eighths, until
    the row that ends engines is alone and left out. `pool.max_restarts` bounds that.
    """

    def __init__(self, spec: EngineSpec, pool: Pool, name: str, stall_timeout_s: float = 1800.0) -> None:
        self._spec, self._pool, self._name = spec, pool, name
        self._timeout_s = stall_timeout_s
        self._restarts = 0
        self._folder: str | None = None
        self._engines = [self._start(i) for i in range(pool.max_size)]
        self.weights_version = 0

    def _start(self, index: int) -> Any:
        placed = {"num_cpus": self._pool.cpus, "num_gpus": self._pool.gpus * self._spec.settings.tensor_parallel}
        actor = ray.remote(EngineHost).options(name=f"{self._name}-{index}-{self._restarts}", max_restarts=0, **placed)
        return actor.remote(self._spec)

    def __enter__(self) -> EnginePool:
        """Wait until every engine is up."""
        try:
            self._await_start(self._engines)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the engines."""
        self.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        batch_size: int,
        progress: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> list[Completion | None]:
        """One answer per prompt, in order, None for a prompt that ends engines; batches go to whichever engine is free.

        `progress(rows, tokens)` is called per batch. Raises ClusterError when engines end too often, or nothing comes.
        """
        rows = list(range(len(prompts)))
        waiting = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        answers: list[Completion | None] = [None] * len(prompts)
        idle = list(range(len(self._engines)))
        running: dict[Any, tuple[list[int], int]] = {}
        died: list[list[int]] = []
        while waiting or running:
            while waiting and idle:
                batch, engine = waiting.pop(0), idle.pop()
                ref = self._engines[engine].generate.remote([prompts[i] for i in batch], sampling)
                running[ref] = (batch, engine)
            done, _ = ray.wait(list(running), timeout=self._timeout_s)
            if not done:
                held = sum(len(b) for b, _ in running.values())
                raise ClusterError(
                    f"{self._name}: no engine finished a batch within {self._timeout_s:g} s; {held} prompts are in flight on "
                    f"{len(running)} engines. Raise cluster.stall_timeout_s or lower evaluate.batch_size."
                )
            batch, engine = running.pop(done[0])
            idle.append(engine)
            try:
                made = ray.get(done[0])
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                self._replace(engine, error)
                died.append(batch)
                waiting[:0] = plan(batch, died)[0]
                continue
            for i, completion in zip(batch, made, strict=True):
                answers[i] = completion
            progress(len(batch), sum(len(c.token_ids) for c in made))
        return answers

    def _replace(self, index: int, error: Exception) -> None:
        """A new engine in a dead one's place, with the current weights."""
        self._restarts += 1
        if self._restarts > self._pool.max_restarts:
            raise ClusterError(
                f"{self._name}: engines ended {self._restarts} times, more than generate.pool.max_restarts="
                f"{self._pool.max_restarts} allows; the last one with: {last_line(error)}"
            ) from error
        ray.kill(self._engines[index])  # one that only raised is in an unknown state
        self._engines[index] = self._start(index)
        self._await_start([self._engines[index]])
        if self._folder is not None:
            self._loaded([self._engines[index].load_weights.remote(self._folder, self.weights_version)])

    def _await_start(self, engines: Sequence[Any]) -> None:
        waiting = [e.ready.remote() for e in engines]
        try:
            ray.get(waiting, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            late = len(ray.wait(waiting, num_returns=len(waiting), timeout=0)[1])
            raise ClusterError(
                f"{self._name}: {late} of {len(waiting)} engines did not start within {self._timeout_s:g} s; each reserves "
                f"{self._pool.cpus:g} CPUs and {self._pool.gpus * self._spec.settings.tensor_parallel:g} GPUs, and "
                f"{ray.available_resources().get('CPU', 0):g} CPUs and {ray.available_resources().get('GPU', 0):g} GPUs are free"
            ) from error
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            raise ClusterError(f"{self._name}: an engine did not start: {last_line(error)}") from error

    def load_weights(self, folder: str) -> int:
        """Swap the weights of every engine; stops the run when engines disagree. Returns the new version."""
        version = self.weights_version + 1
        states = self._loaded([e.load_weights.remote(folder, version) for e in self._engines])
        for i, state in enumerate(states):
            if state != states[0] or state[0] != version:
                raise ClusterError(f"engine {i} holds other weights than engine 0 after the update: {state} against {states[0]}")
        self.weights_version, self._folder = version, folder
        return version

    def _loaded(self, answers: Sequence[Any]) -> list[Any]:
        """What engines say after loading weights; ClusterError when one ends instead, or says nothing in time."""
        try:
            return list(ray.get(list(answers), timeout=self._timeout_s))
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"{self._name}: an engine did not load the weights within {self._timeout_s:g} s; raise cluster.stall_timeout_s "
                "where the storage is only slow, and run the same command again"
            ) from error
        except ray.exceptions.RayActorError as error:
            raise ClusterError(f"{self._name}: an engine ended while it loaded the weights: {last_line(error)}") from error

    def close(self) -> None:
        """Stop the engines' processes."""
        for engine in self._engines:
            ray.kill(engine)
        self._engines = []


def last_line(error: Exception) -> str:
    """What an error that came from another process says in the end: the exception there, below its traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
