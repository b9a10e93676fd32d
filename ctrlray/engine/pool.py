"""A persistent pool of named engine actors: started once, their weights replaced in place and proved, shared by a whole run."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from ctrlray.actors import GONE, ActorPool, Words, last_line
from ctrlray.config import Pool, Sampling
from ctrlray.engine.engine import Completion, EngineSpec
from ctrlray.engine.landing import Landing
from ctrlray.engine.probes import Expected, Held, compare
from ctrlray.engine.transfer import Offer, Ranks, Received
from ctrlray.errors import ClusterError
from ctrlray.telemetry import current, record

if TYPE_CHECKING:  # the pool hands tensors on and computes nothing
    from torch import Tensor


class EngineHost:
    """One engine in a process of its own."""

    def __init__(self, spec: EngineSpec) -> None:
        os.environ.update(spec.environment())
        self._engine = spec.build()

    def ready(self) -> int:
        """Answers once the engine is up."""
        return os.getpid()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One answer per prompt."""
        return [samples[0] for samples in self._engine.generate(prompts, sampling)]

    def logp(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """Log-probs of answers after their contexts."""
        return self._engine.logp(contexts, answers)

    def load_weights(self, folder: str, version: int) -> Held:
        """Swap weights for a folder's; returns what is now in force."""
        return self._engine.load_weights(folder, version)

    def load_adapter(self, adapter: Mapping[str, Any], card: Mapping[str, Any], version: int) -> Held:
        """Swap weights for the engine's own checkpoint with an adapter of NumPy arrays; returns what is now in force."""
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # arrays in Ray's store cannot be written to, and are only read
            tensors = {name: torch.from_numpy(values) for name, values in adapter.items()}
        return self._engine.load_adapter(tensors, card, version)

    def receive_weights(self, offer: Offer, index: int) -> Received:
        """Swap weights for those that a trainer sends; returns what is now in force."""
        return self._engine.receive_weights(offer, index)

    def cache_hits(self) -> tuple[int, int]:
        """Prompt tokens looked up in the prefix cache, and those found."""
        return self._engine.cache_hits()


class Seconds(NamedTuple):
    """What an update of the weights took: the slowest engine's merge and reload, and all of it as the caller waits for it."""

    merge: float
    reload: float
    total: float


class Sync(NamedTuple):
    """An update of all engines' weights that was proved."""

    version: int
    seconds: Seconds
    checksums: dict[str, float]


class EnginePool:
    """Engines `<name>-0-0`, `<name>-1-0`, ...; use as a context manager.

    An engine that dies or raises is replaced, given the current weights, and its rows are tried again in eighths, until
    the row that ends engines is alone and left out. `pool.max_restarts` bounds that. `batch_setting` is what messages
    advise to lower.
    """

    def __init__(
        self,
        spec: EngineSpec,
        pool: Pool,
        name: str,
        stall_timeout_s: float = 1800.0,
        batch_setting: str = "evaluate.batch_size",
    ) -> None:
        self._name, self._timeout_s = name, stall_timeout_s
        self._give: Callable[[Any], Any] | None = None
        self.renew: Callable[[], None] | None = None
        """How engines get the weights in force when one took another's place, where a trainer sends them."""
        self._width = spec.settings.tensor_parallel
        self._checksums: dict[str, float] = {}
        self.weights_version = 0
        words = Words("engine", "an", "prompts", "generate.pool.max_restarts", batch_setting)
        placed = pool.model_copy(update={"gpus": pool.gpus * spec.settings.tensor_parallel})
        self._engines = ActorPool(EngineHost, (spec,), placed, name, words, stall_timeout_s, self._restore)

    def __enter__(self) -> EnginePool:
        """Wait until every engine is up."""
        self._engines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the engines."""
        self.close()

    def close(self) -> None:
        """Stop the engines' processes."""
        self._engines.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        batch_size: int,
        done: Callable[[list[int], list[Completion]], None] = lambda rows, made: None,
    ) -> list[Completion | None]:
        """One answer per prompt, in order, None for a prompt that ends engines; batches go to whichever engine is free.

        `done(rows, made)` is called with each batch's places among the prompts, and its answers. Raises ClusterError when engines
        end too often, or nothing comes.
        """
        answers: list[Completion | None] = [None] * len(prompts)

        def keep(batch: list[int], made: list[Completion]) -> None:
            for i, completion in zip(batch, made, strict=True):
                answers[i] = completion
            done(batch, made)

        self._engines.run(len(prompts), batch_size, lambda e, rows: e.generate.remote([prompts[i] for i in rows], sampling), keep)
        return answers

    def logp(
        self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int
    ) -> list[float | None]:
        """Nats; what the weights in force give each answer after its context, in order, None for a row that ends engines."""
        found: list[float | None] = [None] * len(answers)

        def submit(engine: Any, rows: list[int]) -> Any:
            return engine.logp.remote([contexts[i] for i in rows], [answers[i] for i in rows])

        def keep(rows: list[int], made: list[float]) -> None:
            for i, value in zip(rows, made, strict=True):
                found[i] = value

        self._engines.run(len(answers), batch_size, submit, keep)
        return found

    def hit_rate(self) -> float:
        """Share of prompt tokens found in the prefix caches of the engines, each since its start; NaN when none was looked up."""
        counts = [c for c in self._engines.ask(lambda engine: engine.cache_hits.remote()) if not isinstance(c, Exception)]
        queried = sum(c[0] for c in counts)
        return sum(c[1] for c in counts) / queried if queried else float("nan")

    def load_weights(self, folder: str) -> int:
        """Swap the weights of every engine; stops the run when one cannot prove it. Returns the new version."""
        version = self.weights_version + 1
        self._load(lambda engine: engine.load_weights.remote(folder, version), version)
        return version

    def load_adapter(self, adapter: Mapping[str, Tensor], card: Mapping[str, Any], version: int) -> Sync:
        """Give every engine the checkpoint it started from with an adapter merged into it, as `version`.

        Raises ConfigError when a tensor of the adapter has no home there, ClusterError when an engine cannot prove that it
        computes with the new weights. An engine that ended since its last work, or over the update, is replaced.
        """
        begun = time.monotonic()
        self._engines.heal()
        arrays = ray.put({name: tensor.detach().float().cpu().numpy() for name, tensor in adapter.items()})
        settings = dict(card)
        held = self._load(lambda engine: engine.load_adapter.remote(arrays, settings, version), version)
        slowest = max(held, key=lambda h: h.merge_s + h.reload_s)
        return Sync(version, Seconds(slowest.merge_s, slowest.reload_s, time.monotonic() - begun), dict(self._checksums))

    def heal(self) -> None:
        """Wait until no engine works, and replace those that ended since they last had work."""
        self._engines.heal()

    @property
    def ranks(self) -> Ranks:
        """The engines' places beside a trainer."""
        return Ranks(len(self._engines.actors), self._width)

    @property
    def members(self) -> int:
        """Another number whenever the pool has another member."""
        return self._engines.replaced

    def receive(self, offer: Offer) -> Landing:
        """Have every engine take the weights that a trainer sends now."""
        return Landing(self._name, self._engines, offer)

    def prove(self, landing: Landing, expected: Expected) -> Sync:
        """What all engines hold now; `expected` is what the trainer sent.

        Raises ClusterError when one cannot prove that it computes with it.
        """
        version = landing.offer.version
        held = []
        for index, r in sorted(landing.received.items()):
            held.append(self._proved(index, Held(r.version, compare(expected, r.sums), 0.0, r.seconds), version))
            self._agree(index, held[-1], held[0].checksums)
        self._checksums, self.weights_version = held[0].checksums, version
        record(current(), "ctrlray_weights_version", version)
        slowest = max(h.reload_s for h in held)
        return Sync(version, Seconds(0.0, slowest, slowest), dict(self._checksums))

    def _load(self, give: Callable[[Any], Any], version: int) -> list[Held]:
        answers = [self._replaced_and_given(i, answer, give) for i, answer in enumerate(self._engines.ask(give))]
        held = [self._proved(i, answer, version) for i, answer in enumerate(answers)]
        for i, other in enumerate(held):
            self._agree(i, other, held[0].checksums)
        self._give, self._checksums, self.weights_version = give, held[0].checksums, version
        record(current(), "ctrlray_weights_version", version)
        return held

    def _replaced_and_given(self, index: int, answer: Any, give: Callable[[Any], Any]) -> Any:
        """What the engine in that place says to `give`, where the one that was asked may have died over it."""
        while isinstance(answer, GONE):
            self._engines.replace(index, answer)
            (answer,) = self._engines.ask(give, [index])
        return answer

    def _restore(self, index: int) -> None:
        """Give an engine that took another's place the weights in force; it starts with those of version 0."""
        if self.renew is not None and self.weights_version:
            self.renew()
        if self._give is None:
            return
        (answer,) = self._engines.ask(self._give, [index])
        if isinstance(answer, GONE):
            return self._engines.replace(index, answer)
        self._agree(index, self._proved(index, answer, self.weights_version), self._checksums)

    def _proved(self, index: int, answer: Any, version: int) -> Held:
        """What an engine says after an update, unless it does not hold what it was given."""
        who = f"{self._name}: engine {index}"
        if isinstance(answer, ray.exceptions.GetTimeoutError):
            raise ClusterError(
                f"{who} did not load the weights within {self._timeout_s:g} s; raise cluster.stall_timeout_s where the storage "
                "is only slow, and run the same command again"
            ) from answer
        if isinstance(answer, Exception):
            raise ClusterError(f"{who} failed to load the weights: {last_line(answer)}") from answer
        held: Held = answer
        if held.version != version:
            raise ClusterError(f"{who} holds weights of version {held.version} after the update to {version}")
        for name, probe in held.probes.items():
            if not probe.holds:
                raise ClusterError(
                    f"{who} does not compute with the weights of version {version}: its {name} adds up to {probe.found!r}, "
                    f"what it was given to {probe.expected!r}"
                )
        return held

    def _agree(self, index: int, held: Held, checksums: Mapping[str, float]) -> None:
        """The same numbers go through the same operations everywhere, so equal weights have equal sums."""
        if held.checksums == checksums:
            return
        odd = sorted(n for n in held.checksums.keys() | checksums.keys() if held.checksums.get(n) != checksums.get(n))
        raise ClusterError(
            f"{self._name}: engine {index} holds other weights than engine 0 after the update: its {odd[0]} adds up to "
            f"{held.checksums.get(odd[0])!r}, that of engine 0 to {checksums.get(odd[0])!r}"
        )
