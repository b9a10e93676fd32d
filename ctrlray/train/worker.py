"""The training loop that Ray Train runs on every worker: one objective, from the prepared base to an adapter."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ctrlray import config, schema
from ctrlray.control import ControlSpace
from ctrlray.models import PreparedBase
from ctrlray.tables import Storage, from_rows
from ctrlray.train.extension import clear_locks


@dataclass(frozen=True)
class TrainTask:
    """What one run of the loop needs; picklable, with tables by address."""

    base: PreparedBase
    space: ControlSpace
    objective: config.Likelihood
    settings: config.Train
    examples: Storage
    out: Storage
    dtype: str
    seed: int
    key: str


def train_loop(raw: dict[str, Any]) -> None:
    """Entry point of a worker. `raw["task"]` is a TrainTask."""
    task: TrainTask = raw["task"]
    settle(task.settings, task.seed)
    loop = _Loop(task)
    loop.run()


def settle(settings: config.Optimization, seed: int) -> None:
    """Threads, determinism and the seed of a worker, before it builds anything."""
    import torch

    if not torch.cuda.is_available():
        clear_locks()
        _use_all_cores(settings)
        # rows gathered by index add their gradients up in thread order otherwise: two runs differ in the last bit
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    torch.manual_seed(seed)


def _use_all_cores(settings: config.Optimization) -> None:
    """Ray gives a worker as many threads as it reserves CPUs; a single worker may use the idle rest of the machine."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))


def reseed(seed: int, step: int, rank: int) -> None:
    """Draw anew for each step and rank: a resumed run drops out what an undisturbed one does."""
    import torch

    torch.manual_seed(int(schema.digest(seed, step, rank), 16) % 2**63)


class _Loop:
    """State of one worker's training."""

    def __init__(self, task: TrainTask) -> None:
        import ray.train
        import torch

        from ctrlray.train.engine import Trainer
        from ctrlray.train.models import load_learner, parameter_groups
        from ctrlray.train.trail import Trail

        self.task = task
        context = ray.train.get_context()
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        gpu = torch.cuda.is_available()
        learner = load_learner(
            task.base.folder,
            task.objective,
            task.settings,
            task.base.control_ids,
            task.dtype,
            "cuda" if gpu else "cpu",
        )
        self.learner = learner
        masters = gpu and task.settings.lora is None and task.dtype == "bfloat16"
        groups = parameter_groups(learner, task.settings)
        self.trainer = Trainer(learner, groups, task.settings, gpu=gpu, bf16_masters=masters)
        self._load_examples()
        self.trail = Trail(self.trainer, task.out, self.rank, len(self.steps))

    def _load_examples(self) -> None:
        from ctrlray.train.batches import load_example, planned_steps

        names = list(self.task.space.names)
        table = self.task.examples.read_table("examples", schema.examples(names))
        rows = sorted(table.to_pylist(), key=lambda r: r["example_id"])
        self.renderer = self.task.base.renderer(self.task.space)
        self.pad_id = self.renderer.tokenizer.pad_token_id or self.renderer.tokenizer.eos_token_id or 0
        self.train = [load_example(r, names, self.renderer.render) for r in rows if r["split"] == "train"]
        self.valid_rows = [r for r in rows if r["split"] == "valid"]
        groups = [e.group for e in self.train]
        self.steps = planned_steps(groups, self.task.settings.batch_size, self.task.settings.epochs, self.task.seed)

    def run(self) -> None:
        """Train from the start, or from the last checkpoint of this very task."""
        for step in range(self.trail.resume(), len(self.steps)):
            point = self._step(step)
            last = step == len(self.steps) - 1
            measured = last or (step + 1) % self.task.settings.eval_every == 0
            began = time.perf_counter()
            gaps = self._code_gaps(None if last else self.task.settings.eval_examples) if measured else []
            if gaps:
                point["valid_seconds"] = time.perf_counter() - began
                right = sum(g["nll_right"] for g in gaps) / len(gaps)
                wrong = sum(g["nll_wrong"] for g in gaps) / len(gaps)
                point |= {"valid_nll": right, "valid_gap": wrong - right}
            self.trail.add(point)
            if last:
                self._write_results(gaps)
            if measured:
                self.trail.keep(point)

    def _step(self, step: int) -> dict[str, float]:
        from ctrlray.train.batches import shard, tree_rows
        from ctrlray.train.engine import learning_rate_factor

        s, began = self.task.settings, time.perf_counter()
        reseed(self.task.seed, step, self.rank)
        wrong = self.task.objective.type == "exmate" and self.task.objective.weight > 0
        chosen = [(i, self.train[i]) for i in self.steps[step]]
        rows = tree_rows(chosen, wrong=wrong, share=s.share_prompts and self.learner.shares)
        branches = [b for row in rows for b in row.branches]
        num_tokens = sum(b.weight * len(b.token_ids) for b in branches if b.right)
        num_wrong = sum(not b.right for b in branches)
        mine = shard(rows, self.ranks, s.micro_batch_tokens, packed=self.learner.shares)[self.rank]
        rate = learning_rate_factor(step, len(self.steps), s.warmup)
        parts = self.trainer.step(
            [self.learner.collated(m, self.pad_id) for m in mine],
            rate,
            ranks=self.ranks,
            num_tokens=num_tokens,
            num_wrong=num_wrong,
        )
        tokens = sum(r.num_tokens for r in rows)
        parts = sum_over_ranks(parts, self.ranks)
        return {
            "step": step + 1,
            "loss": parts["nll"] + self.task.objective.weight * parts.get("leak", 0.0),
            **parts,
            "lr": s.learning_rate * rate,
            "tokens": tokens,
            "seconds": time.perf_counter() - began,
            **{f"{phase}_s": seconds for phase, seconds in self.trainer.phases.items()},
        }

    def _code_gaps(self, limit: int | None) -> list[dict[str, Any]]:
        """NLL of held-out examples under their own code and under every other code of the grid, sharded over ranks."""
        import torch.distributed as dist

        from ctrlray.train.batches import TrainExample, shard, tree_rows

        rows = sorted(self.valid_rows, key=lambda r: schema.digest(self.task.seed, r["example_id"]))[:limit]
        names, found = self.task.space.names, []
        pairs = []
        for i, row in enumerate(rows):
            own = tuple(row[f"level_{n}"] for n in names)
            cells = [own, *(c for c in self.task.space.cells() if c != own)]
            prompts = tuple(tuple(self.renderer.render(row["messages"], c)) for c in cells)
            pairs.append((i, TrainExample(prompts, (tuple(row["token_ids"]),) * len(cells), 1.0, row["example_id"])))
        shares, most = self.learner.shares, self.task.settings.micro_batch_tokens
        rows_of_pairs = tree_rows(pairs, wrong=True, share=shares)
        for micro in shard(rows_of_pairs, self.ranks, most, packed=shares)[self.rank] if pairs else []:
            batch = self.learner.collated(micro, self.pad_id)
            nll = -self.trainer.measure(batch)
            found += list(zip(batch.example_N.tolist(), batch.right_N.tolist(), nll.tolist(), strict=True))
        gathered: list[Any] = [None] * self.ranks
        dist.all_gather_object(gathered, found)
        by_example: dict[int, tuple[list[float], list[float]]] = {}
        for index, right, value in (f for share in gathered for f in share):
            by_example.setdefault(index, ([], []))[0 if right else 1].append(value)
        return [
            {
                "example_id": rows[i]["example_id"],
                "prompt_id": rows[i]["prompt_id"],
                "method": self.task.objective.type,
                "nll_right": right[0],
                "nll_wrong": sum(wrong) / len(wrong),
            }
            for i, (right, wrong) in sorted(by_example.items())
        ]

    def _write_results(self, gaps: list[dict[str, Any]]) -> None:
        """The adapter, the curves and the gaps; the note that training is done comes last."""
        if not self.trail.write_learned(self.task.settings.lora, self.task.base.control_ids):
            return
        out = self.task.out
        out.write_table(from_rows(gaps, schema.code_gaps()), "code_gaps")
        if out.is_local:
            write_tensorboard(self.trail.curves, out.path("tensorboard"))
        seen = len(self.train) + len(self.valid_rows)
        note = {"key": self.task.key, "steps": len(self.steps), "examples": seen, "path": self.learner.path}
        out.write_json(note, "done.json")


def sum_over_ranks(parts: dict[str, float], ranks: int) -> dict[str, float]:
    """Losses are shares of the whole batch and add up; the gradient norm is already global."""
    import torch
    import torch.distributed as dist

    names = sorted(n for n in parts if n != "grad_norm")
    if ranks > 1:
        values = torch.tensor([parts[n] for n in names], dtype=torch.float64)
        dist.all_reduce(values)
        parts = parts | dict(zip(names, values.tolist(), strict=True))
    return parts


def write_tensorboard(curves: list[dict[str, float]], folder: str) -> None:
    """Curves as TensorBoard event files."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        for point in curves:
            for name, value in point.items():
                if name != "step":
                    writer.add_scalar(f"train/{name}", value, int(point["step"]))


def valid_and_train_counts(examples: pa.Table) -> tuple[int, int]:
    """Numbers of held-out and of training examples."""
    splits = examples["split"].to_pylist()
    return splits.count("valid"), splits.count("train")
