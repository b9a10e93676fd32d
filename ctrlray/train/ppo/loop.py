"""The PPO loop that Ray Train runs on every worker: a step's rollouts in, new weights out.

wait for rollouts k -> log-probs and values -> rewards, advantages -> epochs of clipped steps -> weights k + 1
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrlray import config, schema
from ctrlray.control import ControlSpace
from ctrlray.errors import ClusterError
from ctrlray.tables import Storage
from ctrlray.train.ppo.handover import outgoing
from ctrlray.train.ppo.rollouts import ROLLOUTS, part
from ctrlray.train.ppo.weights import write_weights

STOP = "stop.json"
_POLL_S = 0.02


@dataclass(frozen=True)
class PPOTask:
    """What one run of the loop needs; picklable, with tables by address."""

    folder: str
    """The model that PPO starts from."""
    base: str
    """The base that `learned` was trained from."""
    learned: Storage | None
    """What a training of the model that PPO starts from left; None where PPO starts from the base."""
    control_ids: tuple[int, ...]
    space: ControlSpace
    objective: config.PPO
    settings: config.Train
    out: Storage
    dtype: str
    seed: int
    key: str
    pad_id: int
    timeout_s: float
    transfer: config.Transfer


def ppo_loop(raw: dict[str, Any]) -> None:
    """Entry point of a worker. `raw["task"]` is a PPOTask."""
    from ctrlray.train.worker import settle

    task: PPOTask = raw["task"]
    settle(task.settings, task.seed)
    _Loop(task).run()


class _Loop:
    """State of one worker's training."""

    def __init__(self, task: PPOTask) -> None:
        import ray.train
        import torch

        from ctrlray.train.engine import Trainer
        from ctrlray.train.ppo.policy import Origin, load_policy, policy_groups
        from ctrlray.train.trail import Trail, read_learned

        self.task = task
        context = ray.train.get_context()
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        gpu = torch.cuda.is_available()
        device = "cuda" if gpu else "cpu"
        origin = Origin(task.base, *read_learned(task.learned)) if task.learned else None
        model = (task.folder, task.objective, task.settings, task.control_ids, task.dtype, device)
        self.policy = load_policy(*model, origin)
        masters = gpu and task.settings.lora is None and task.dtype == "bfloat16"
        self.trainer = Trainer(
            self.policy, policy_groups(self.policy, task.settings), task.settings, gpu=gpu, bf16_masters=masters
        )
        self.outgoing = outgoing(task, self.policy.network, self.rank, self.ranks) if task.transfer == "nccl" else None
        self.trail = Trail(self.trainer, task.out, self.rank, task.objective.steps)
        self.kl_coefficient = task.objective.kl.coefficient

    def run(self) -> None:
        """Train from the start, or from the last snapshot of this very task."""
        import ray.train

        first = self.trail.resume()
        if self.trail.curves:
            self.kl_coefficient = self.trail.curves[-1]["next_kl_coefficient"]
        steps = self.task.objective.steps
        if first:  # what the engines wait for after a restart may be gone
            self._publish(first)
        for step in range(first, steps):
            last = step == steps - 1
            measured = last or (step + 1) % self.task.settings.eval_every == 0
            point = self._step(step, measured)
            began = time.perf_counter()
            self._publish(step + 1)
            point["publish_s"] += time.perf_counter() - began
            self.trail.add(point)
            if last:
                self._write_results()
            if measured:
                self.trail.keep(point)
            else:
                ray.train.report(dict(point))

    def _step(self, step: int, measured: bool) -> dict[str, float]:
        from ctrlray.train.ppo.batch import Rollouts
        from ctrlray.train.worker import reseed

        arrived = time.perf_counter()
        sent_s = self._await(step)
        began = time.perf_counter()
        names = list(self.task.space.names)
        table = self.task.out.read_part(ROLLOUTS, part(step), schema.rollouts(names))
        rollouts = Rollouts.of(table.to_pylist(), names, self.task.objective.weights)
        reseed(self.task.seed, step, self.rank)
        point = self._learn(step, rollouts, measured)
        notes = self.task.out.read_json(ROLLOUTS, f"{part(step)}.json")
        dropped = notes.pop("dropped")
        versions = table["weights_version"].to_pylist()
        return {
            "step": step + 1,
            "rollouts": float(table.num_rows),
            "used": float(len(rollouts)),
            **{f"dropped_{reason}": float(number) for reason, number in dropped.items()},
            "staleness": float(step - min(versions)),
            **point,
            **notes,
            "next_kl_coefficient": self.kl_coefficient,
            "tokens": sum(len(t) for t in table["token_ids"].to_pylist()),
            "wait_s": began - arrived - sent_s,
            "publish_s": sent_s,
            "seconds": time.perf_counter() - began,
        }

    def _await(self, step: int) -> float:
        """Wait for a step's rollouts and meanwhile send weights to engines that ask; returns the seconds that sending took.

        Raises ClusterError when the driver stopped, or when nothing comes in time.
        """
        end = time.monotonic() + self.task.timeout_s
        before = self.outgoing.seconds if self.outgoing else 0.0
        while not self._may_begin(step):
            if self.task.out.exists(STOP):
                raise ClusterError(f"the driver stopped: {self.task.out.read_json(STOP)['reason']}")
            if time.monotonic() > end:
                raise ClusterError(f"no rollouts of step {step + 1} came within {self.task.timeout_s:g} s")
            time.sleep(_POLL_S if self.task.out.is_local else 0.5)
        return self.outgoing.seconds - before if self.outgoing else 0.0

    def _may_begin(self, step: int) -> bool:
        there = self.task.out.exists(ROLLOUTS, f"{part(step)}.parquet")
        return self.outgoing.meet(step, there) if self.outgoing else there

    def _learn(self, step: int, rollouts: Any, measured: bool) -> dict[str, float]:
        """Advantages of a step's rollouts, then its epochs; what both measured."""
        from ctrlray.train.batches import epoch_steps
        from ctrlray.train.ppo import batch as b
        from ctrlray.train.worker import sum_over_ranks

        o, s = self.task.objective, self.task.settings
        batches = [
            chosen
            for epoch in range(o.epochs)
            for chosen in epoch_steps(
                rollouts.prompts,
                o.batch_size,
                self.task.seed,
                step * o.epochs + epoch,
                per_row=o.settings_per_prompt * o.group_size,
            )
        ]
        began = time.perf_counter()
        on_policy = len(batches) == 1
        channels = b.channels(o, self.kl_coefficient, on_policy=on_policy, measured=measured)
        scored = self._scored(rollouts, channels)
        targets = b.targets(o, rollouts, scored, self.kl_coefficient)
        point = b.facts(o, self.task.space.names, rollouts, scored, targets)
        if measured:
            bare = self._scored(rollouts.plain(), ("base",))
            point["kl_base"] = b.kl_mean(scored["policy"], bare["base"], rollouts.mask)
        point["measure_s"] = time.perf_counter() - began
        learns = o.advantage != "gae" or step >= o.critic.warmup_steps
        rate = min(1.0, (step + 1) / max(1, round(s.warmup * o.steps)))
        found: list[dict[str, float]] = []
        phases: dict[str, float] = {}
        for chosen in batches:
            num_tokens = float(rollouts.mask[chosen].sum())
            micro = self._micro(rollouts, chosen)
            parts = self.trainer.step(
                [self._batch(m, rollouts, targets) for m in micro],
                rate,
                ranks=self.ranks,
                num_tokens=num_tokens,
                learns_policy=learns,
                kl=self.kl_coefficient,
            )
            found.append(sum_over_ranks(parts, self.ranks))
            for phase, seconds in self.trainer.phases.items():
                phases[f"{phase}_s"] = phases.get(f"{phase}_s", 0.0) + seconds
        parts = {name: math.fsum(f[name] for f in found) / len(found) for name in found[0]}
        spread = max(parts.pop("ratio_square") - parts["ratio"] ** 2, 0.0)
        if "kl" in point:
            self.kl_coefficient = b.next_coefficient(o.kl, self.kl_coefficient, point["kl"], len(rollouts))
        return point | parts | phases | {"ratio_spread": math.sqrt(spread), "updates": len(batches), "lr": o.learning_rate * rate}

    def _micro(self, rollouts: Any, chosen: Sequence[int]) -> list[Any]:
        """This rank's micro batches of rows of the chosen rollouts."""
        from ctrlray.train.batches import shard, tree_rows

        rows = tree_rows([(i, rollouts.examples[i]) for i in chosen], wrong=False, share=self._shares)
        return shard(rows, self.ranks, self.task.settings.micro_batch_tokens, packed=self.policy.shares)[self.rank]

    @property
    def _shares(self) -> bool:
        return self.task.settings.share_prompts and self.policy.shares

    def _scored(self, rollouts: Any, channels: Sequence[str]) -> dict[str, Any]:
        """Channels of all rollouts, [N, T] each, on every rank."""
        import torch.distributed as dist

        if not channels:
            return {}
        found: list[Any] = []
        for micro in self._micro(rollouts, range(len(rollouts))):
            batch = self.policy.collated(micro, self.task.pad_id)
            values_CNT = self.trainer.measure(batch, channels=tuple(channels))
            found.append((batch.example_N, values_CNT))
        gathered: list[Any] = [None] * self.ranks
        dist.all_gather_object(gathered, found)
        return dict(zip(channels, rollouts.spread([f for share in gathered for f in share], len(channels)), strict=True))

    def _batch(self, micro: Sequence[Any], rollouts: Any, targets: Mapping[str, Any]) -> Any:
        from ctrlray.train.ppo.policy import PolicyBatch

        tree = self.policy.collated(micro, self.task.pad_id)
        width = tree.mask_NT.shape[1]
        return PolicyBatch(tree, *(targets[name][tree.example_N, :width] for name in PolicyBatch._fields[1:]))

    def _publish(self, version: int) -> None:
        """Write the weights that the next rollouts are sampled with, unless engines ask for them."""
        if self.outgoing:
            return
        from ctrlray.train.models import trained_state

        with self.trainer.gathered() as policy:
            if self.rank != 0:
                return
            state, card = trained_state(policy, self.task.settings.lora, self.task.control_ids)
        write_weights(self.task.out, version, state, card)

    def _write_results(self) -> None:
        from ctrlray.train.worker import write_tensorboard

        if not self.trail.write_learned(self.task.settings.lora, self.task.control_ids):
            return
        out = self.task.out
        if out.is_local:
            write_tensorboard(self.trail.curves, out.path("tensorboard"))
        out.write_json({"key": self.task.key, "steps": self.task.objective.steps, "path": self.policy.path}, "done.json")
