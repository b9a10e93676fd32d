"""The driver's side of PPO: engines and reward actors that stay up, rollouts for each step, weights into every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ctrlray import config, schema
from ctrlray.control import ControlSpace, Renderer
from ctrlray.distill import Levels as LevelScale
from ctrlray.engine.engine import EngineSpec
from ctrlray.engine.pool import EnginePool
from ctrlray.errors import ClusterError, DataError
from ctrlray.ledger import Progress
from ctrlray.patience import Background
from ctrlray.rewards.pool import RewardPool
from ctrlray.tables import Storage
from ctrlray.telemetry import current, warn
from ctrlray.train.launch import Watch, launch, waits_for
from ctrlray.train.ppo import handover
from ctrlray.train.ppo.loop import STOP, PPOTask, ppo_loop
from ctrlray.train.ppo.rollouts import ROLLOUTS, Producer, Prompts
from ctrlray.train.ppo.weights import newest_weights, read_weights

_POLL_S = 0.02
LEFT_OUT = "prompts_left_out.json"


def train(
    task: PPOTask,
    job: config.Job,
    spec: EngineSpec,
    prompts: Sequence[Mapping[str, Any]],
    scales: Mapping[str, LevelScale],
    renderer: Renderer,
    name: str,
    place: Storage,
    progress: Progress,
    before: int,
) -> None:
    """Train by reinforcement learning to the end, from the start or from where an earlier run was cut off.

    `place` holds the Ray Train run of that `name`; the task's own folder everything else.
    """
    order = Prompts(prompts, ControlSpace.of(job.control), renderer, task.objective, job.model.max_context, job.train_seed)
    if order.num_usable < task.objective.prompts_per_step:
        raise DataError(
            f"ppo: {order.num_usable} of {len(prompts)} prompts can be asked, and it needs {task.objective.prompts_per_step}: "
            f"{order.num_too_long} leave no room for {task.objective.sampling.max_tokens} tokens of an answer, "
            f"{order.num_refused} hold text that reads as special tokens. Raise model.max_context or prompts.train"
        )
    left_out = {"too_long": order.num_too_long, "special_tokens": order.num_refused}
    left_out = {why: n for why, n in left_out.items() if n}
    task.out.write_json(left_out, LEFT_OUT)
    if left_out:
        warn(current(), f"prompts that cannot be asked are left out: {left_out}")
    if task.out.exists(STOP):
        task.out.remove(STOP)
    handover.clear(task.out)
    timeout = job.cluster.stall_timeout_s
    progress.note("starting vLLM and reward actors")
    with (
        EnginePool(spec, job.generate.pool, f"{job.name}-ppo", timeout) as engines,
        RewardPool(job.teachers, job.score.pool, f"{job.name}-ppo", timeout, job.places(job.teachers)) as rewards,
    ):
        chats = {p["prompt_id"]: p["messages"] for p in prompts}
        producer = Producer(order, chats, job, task.objective, scales, engines, rewards, task.out)
        progress.note("training ppo")
        learner = Background(partial(launch, ppo_loop, {"task": task}, task.settings, name, place, what="train: ppo"))
        try:
            driver = _Driver(task, producer, learner, Watch("ppo", task.out, progress, before), progress, timeout)
            if task.transfer == "nccl":
                driver.incoming = handover.Incoming(task.out, engines, spec.dtype, driver.until)
            driver.run()
        except BaseException as error:
            task.out.write_json({"reason": f"{type(error).__name__}: {error}"}, STOP)
            raise


class _Driver:
    """One training's driver."""

    def __init__(
        self, task: PPOTask, producer: Producer, learner: Background, watch: Watch, progress: Progress, timeout_s: float
    ) -> None:
        self._task, self._producer, self._learner, self._watch = task, producer, learner, watch
        self._progress, self._timeout_s = progress, timeout_s
        self._ended = False
        self.incoming: handover.Incoming | None = None
        """How weights come where the trainer sends them; they are read from storage otherwise."""

    def run(self) -> None:
        """Rollouts for every step that lacks them, then wait for the learner's end."""
        steps = self._task.objective.steps
        for step in range(steps):
            if self._producer.has(step):
                continue
            notes = self._sync(max(0, step - self._task.objective.max_staleness), step)
            tokens = self._producer.make(step, notes)
            self._progress.advance(0, tokens)
        self.until(lambda: self._ended, "the learner to end")

    def _sync(self, least: int, step: int) -> dict[str, float]:
        """The newest weights into every engine, at least version `least`, at most that of `step`; seconds it took."""
        began = time.perf_counter()
        if self.incoming is not None:
            return self._received(self.incoming, least, step, began)
        out = self._task.out
        self.until(lambda: newest_weights(out, least, step) is not None, f"version {least} of the weights")
        waited = time.perf_counter()
        version = newest_weights(out, least, step)
        assert version is not None
        if version != self._producer.engines.weights_version:
            adapter, card = read_weights(out, version)
            self._producer.engines.load_adapter(adapter, card, version)
        return {"sync_s": time.perf_counter() - waited, "learner_s": waited - began}

    def _received(self, incoming: handover.Incoming, least: int, step: int, began: float) -> dict[str, float]:
        engines, waited_s = self._producer.engines, 0.0
        engines.renew = partial(incoming.bring, least, step)
        if engines.weights_version < least:
            engines.renew()
            waited_s = incoming.waited_s
        return {"sync_s": time.perf_counter() - began - waited_s, "learner_s": waited_s}

    def until(self, there: Callable[[], bool], what: object) -> None:
        """Wait for the learner. Raises what the learner raised, or ClusterError when it finishes no step in time."""
        seen, moved = self._watch.seen, time.monotonic()
        while not there():
            self._ended = self._ended or self._learner.over(_POLL_S)
            self._watch.look()
            if self._ended and not there():
                raise ClusterError(f"train: ppo ended while {what} was waited for")
            if self._watch.seen != seen:
                seen, moved = self._watch.seen, time.monotonic()
            if time.monotonic() - moved > self._timeout_s:
                learner = waits_for(self._task.out, self._task.settings)
                raise ClusterError(
                    f"train: ppo: nothing finished for {self._timeout_s:g} s; it waits for {what}, the learner for {learner}. "
                    "What is finished is kept: "
                    "mend that, or raise cluster.stall_timeout_s where it is only slow, and run the same command again."
                )
        self._watch.look()


def accounts(place: Storage, names: Sequence[str]) -> dict[str, Any]:
    """Rollouts in = used + dropped, over all steps; and how many prompts were never asked, by reason."""
    table = place.read_table(ROLLOUTS, schema.rollouts(names), ["error"])
    errors = table["error"].to_pylist()
    dropped = {reason: errors.count(reason) for reason in sorted(set(errors)) if reason}
    left_out = place.read_json(LEFT_OUT) if place.exists(LEFT_OUT) else {}
    return {"rollouts": len(errors), "used": errors.count(""), "dropped": dropped, "prompts_left_out": left_out}
