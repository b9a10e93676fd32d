"""A persistent pool of named engine actors: started once, kept across weight updates, shared by what runs in a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray

from ctrlray.config import Pool, Sampling
from ctrlray.engine.engine import Completion, Engine, EngineSpec
from ctrlray.errors import ClusterError


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
    """Engines `<name>-0`, `<name>-1`, ...; use as a context manager."""

    def __init__(self, spec: EngineSpec, pool: Pool, name: str) -> None:
        actor = ray.remote(EngineHost)
        placed = {"num_cpus": pool.cpus, "num_gpus": pool.gpus * spec.settings.tensor_parallel, "max_restarts": 0}
        self._engines = [actor.options(name=f"{name}-{i}", **placed).remote(spec) for i in range(pool.max_size)]
        self.weights_version = 0

    def __enter__(self) -> EnginePool:
        """Wait until every engine is up."""
        try:
            ray.get([e.ready.remote() for e in self._engines])
        except ray.exceptions.RayActorError as error:
            self.close()
            raise ClusterError(f"an engine did not start: {error}") from error
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
    ) -> list[Completion]:
        """One answer per prompt, in order; batches go to whichever engine is free. `progress(rows, tokens)` per batch."""
        starts = list(range(0, len(prompts), batch_size))
        answers: list[Completion | None] = [None] * len(prompts)
        idle = list(self._engines)
        running: dict[Any, tuple[int, Any]] = {}
        while starts or running:
            while starts and idle:
                start, engine = starts.pop(0), idle.pop()
                running[engine.generate.remote(list(prompts[start : start + batch_size]), sampling)] = (start, engine)
            (done,), _ = ray.wait(list(running))
            start, engine = running.pop(done)
            batch = ray.get(done)
            idle.append(engine)
            answers[start : start + len(batch)] = batch
            progress(len(batch), sum(len(c.token_ids) for c in batch))
        return [a for a in answers if a is not None]

    def load_weights(self, folder: str) -> int:
        """Swap the weights of every engine; stops the run when engines disagree. Returns the new version."""
        version = self.weights_version + 1
        states = ray.get([e.load_weights.remote(folder, version) for e in self._engines])
        for i, state in enumerate(states):
            if state != states[0] or state[0] != version:
                raise ClusterError(f"engine {i} holds other weights than engine 0 after the update: {state} against {states[0]}")
        self.weights_version = version
        return version

    def close(self) -> None:
        """Stop the engines' processes."""
        for engine in self._engines:
            ray.kill(engine)
        self._engines = []
