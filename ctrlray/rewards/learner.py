"""Fine-tuning a reward model on Ray Train's workers: the network and its loss, its batches, and the loop.

Shape key: N sequences of padded length S, P preference pairs, A attributes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from ctrlray import schema
from ctrlray.errors import ConfigError
from ctrlray.objectives.losses import Loss
from ctrlray.objectives.reward import bradley_terry, regression
from ctrlray.rewards.encode import pad
from ctrlray.rewards.job import FineTune
from ctrlray.rewards.precise import widen_head
from ctrlray.tables import Storage
from ctrlray.train.batches import planned_steps, shard


@dataclass(frozen=True)
class RewardTask:
    """What one run of the loop needs; picklable, with model and labels by address."""

    start: str
    """Folder of the sequence classifier that training starts from."""
    settings: FineTune
    out: Storage
    """Holds the table `labels`; gets `adapter`, `curves.json` and `done.json`."""
    dtype: str
    seed: int
    trust_remote_code: bool = False


class Batch(NamedTuple):
    """Tensors of one micro batch."""

    ids_NS: Tensor
    mask_NS: Tensor
    chosen_P: Tensor
    """Index of the sequence that won; the one that lost follows it."""
    head_P: Tensor
    margin_P: Tensor
    rating_NA: Tensor
    rated_NA: Tensor
    """1 where the sequence has a rating of the attribute."""


class Unit(NamedTuple):
    """A row of the labels table as it is dealt to a worker: a pair stays together."""

    row: int
    num_tokens: int
    """Padded: both answers of a pair count as the longer one."""
    pair: bool


class LabelTable:
    """The labels, which stay in Arrow's memory until a batch is made of some."""

    def __init__(self, source: Storage, pad_id: int, num_attributes: int) -> None:
        table = source.read_table("labels", schema.labels())
        self._columns = {name: table[name].combine_chunks() for name in table.column_names}
        self._pad_id, self._num_attributes = pad_id, num_attributes
        first, second = (pc.list_value_length(self._columns[n]).to_pylist() for n in ("token_ids", "rejected_ids"))
        units = [Unit(i, 2 * max(a, b) if b else a, b > 0) for i, (a, b) in enumerate(zip(first, second, strict=True))]
        splits = self._columns["split"].to_pylist()
        self.train = [u for u in units if splits[u.row] == "train"]
        self.valid = [u for u in units if splits[u.row] == "valid"]

    def totals(self, units: Sequence[Unit]) -> dict[str, float]:
        """How many pairs and how many ratings there are in the rows."""
        ratings = [x for u in units if not u.pair for x in self._columns["ratings"][u.row].as_py()]
        return {"num_pairs": float(sum(u.pair for u in units)), "num_ratings": float(sum(x == x for x in ratings))}

    def shards(self, units: Sequence[Unit], ranks: int, max_tokens: int) -> list[list[list[Unit]]]:
        """`[rank][micro batch][unit]`; pairs and ratings do not mix, because a pair is as wide as two."""
        kinds = [shard([u for u in units if u.pair == pair], ranks, max_tokens, packed=False) for pair in (True, False)]
        return [pairs + ratings for pairs, ratings in zip(*kinds, strict=True)]

    def collate(self, units: Sequence[Unit]) -> Batch:
        """Tensors of the rows. No rows give one sequence without labels: every rank has to run its network."""
        rows: list[list[int]] = []
        chosen, heads, margins, ratings = [], [], [], []
        none = [float("nan")] * self._num_attributes
        for u in units:
            row = {name: column[u.row].as_py() for name, column in self._columns.items()}
            if u.pair:
                chosen.append(len(rows))
                heads.append(row["head"])
                margins.append(row["margin"])
                rows += [row["token_ids"], row["rejected_ids"]]
                ratings += [none, none]
            else:
                rows.append(row["token_ids"])
                ratings.append(row["ratings"])
        ids_NS, mask_NS = pad(rows or [[self._pad_id]], self._pad_id)
        rating_NA = torch.tensor(ratings or [none], dtype=torch.float32)
        return Batch(
            ids_NS,
            mask_NS,
            torch.tensor(chosen, dtype=torch.long),
            torch.tensor(heads, dtype=torch.long),
            torch.tensor(margins, dtype=torch.float32),
            rating_NA.nan_to_num(),
            (~rating_NA.isnan()).float(),
        )


def label_loss(score_NA: Tensor, batch: Batch, num_pairs: float, num_ratings: float) -> Loss:
    """Bradley-Terry of the batch's pairs plus squared error of its ratings, each the mean over the whole batch's."""
    total, parts = 0.0 * score_NA.sum(), dict[str, Tensor]()
    if num_pairs:
        chosen_P = score_NA[batch.chosen_P, batch.head_P]
        rejected_P = score_NA[batch.chosen_P + 1, batch.head_P]
        fit = bradley_terry(chosen_P, rejected_P, batch.margin_P, num_pairs=num_pairs)
        total, parts = total + fit.total, parts | fit.parts
    if num_ratings:
        fit = regression(score_NA, batch.rating_NA, batch.rated_NA, num_ratings=num_ratings)
        total, parts = total + fit.total, parts | fit.parts
    return Loss(total, parts)


class RewardNetwork(nn.Module):
    """A sequence classifier and its loss in one module, so that sharded engines gather parameters inside forward."""

    def __init__(self, network: Any, compute: torch.dtype, device: str) -> None:
        super().__init__()
        self.network = network
        self.compute = compute
        self.device_type = device

    def forward(self, batch: Batch, num_pairs: float = 0.0, num_ratings: float = 0.0) -> Loss | Tensor:
        """The loss of a micro batch; without totals the logits, float32 [N, A]."""
        with torch.autocast(self.device_type, self.compute, enabled=self.compute != torch.float32):
            score_NA: Tensor = self.network(input_ids=batch.ids_NS, attention_mask=batch.mask_NS).logits.float()
        if not num_pairs and not num_ratings:
            return score_NA
        return label_loss(score_NA, batch, num_pairs, num_ratings)


def load_network(task: RewardTask, device: str) -> RewardNetwork:
    """The start with what trains in float32: LoRA in the blocks and all that is outside of them, or everything."""
    from transformers import AutoModelForSequenceClassification

    from ctrlray.train.models import add_lora

    lora, compute = task.settings.lora, getattr(torch, task.dtype)
    network = AutoModelForSequenceClassification.from_pretrained(
        task.start, dtype=torch.float32 if lora is None else compute, trust_remote_code=task.trust_remote_code
    )
    network.config.use_cache = False
    widen_head(network)
    if lora is not None:
        blocks = network.base_model
        if blocks is network or not any(isinstance(m, nn.Linear) for m in blocks.modules()):
            raise ConfigError(
                f"method.lora: a {type(network).__name__} has no linear layers that LoRA could adapt; set method.lora=null"
            )
        blocks.requires_grad_(False)
        add_lora(blocks, lora)
    if task.settings.activation_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.train()
    return RewardNetwork(network, compute, device).to(device)


def reward_loop(raw: dict[str, Any]) -> None:
    """Entry point of a worker. `raw["task"]` is a RewardTask."""
    from ctrlray.train.worker import settle

    task: RewardTask = raw["task"]
    settle(task.settings, task.seed)
    _Loop(task).run()


class _Loop:
    """State of one worker's training."""

    def __init__(self, task: RewardTask) -> None:
        import ray.train

        from ctrlray.train.engine import Trainer
        from ctrlray.train.trail import Trail

        self.task = task
        context = ray.train.get_context()
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        gpu = torch.cuda.is_available()
        network = load_network(task, "cuda" if gpu else "cpu")
        settings = network.network.config
        self.labels = LabelTable(task.out, settings.pad_token_id, settings.num_labels)
        s = task.settings
        trained = [p for p in network.parameters() if p.requires_grad]
        groups = [{"params": trained, "lr": s.learning_rate, "weight_decay": s.weight_decay}]
        self.trainer = Trainer(network, groups, s, gpu=gpu)
        self.steps = planned_steps([str(u.row) for u in self.labels.train], s.batch_size, s.epochs, task.seed)
        held_out = sorted(self.labels.valid, key=lambda u: schema.digest(task.seed, u.row))
        self.held_out = held_out[: s.eval_rows]
        self.trail = Trail(self.trainer, task.out, self.rank, len(self.steps))

    def run(self) -> None:
        """Train from the start, or from the last checkpoint of this very task."""
        for step in range(self.trail.resume(), len(self.steps)):
            point = self._step(step)
            last = step == len(self.steps) - 1
            measured = last or (step + 1) % self.task.settings.eval_every == 0
            if measured:
                point |= {f"valid_{name}": value for name, value in self._held_out().items()}
            self.trail.add(point)
            if last and self.trail.write_learned(self.task.settings.lora, ()):
                self.task.out.write_json({"steps": len(self.steps)}, "done.json")
            if measured:
                self.trail.keep(point)

    def _step(self, step: int) -> dict[str, float]:
        from ctrlray.train.engine import learning_rate_factor
        from ctrlray.train.worker import reseed, sum_over_ranks

        s, began = self.task.settings, time.perf_counter()
        reseed(self.task.seed, step, self.rank)
        units = [self.labels.train[i] for i in self.steps[step]]
        mine = self.labels.shards(units, self.ranks, s.micro_batch_tokens)[self.rank]
        rate = learning_rate_factor(step, len(self.steps), s.warmup)
        batches = [self.labels.collate(m) for m in mine]
        parts = self.trainer.step(batches, rate, ranks=self.ranks, **self.labels.totals(units))
        parts = sum_over_ranks(parts, self.ranks)
        return {
            "step": step + 1,
            "loss": parts.get("bradley_terry", 0.0) + parts.get("squared_error", 0.0),
            **parts,
            "lr": s.learning_rate * rate,
            "tokens": sum(u.num_tokens for u in units),
            "seconds": time.perf_counter() - began,
        }

    def _held_out(self) -> dict[str, float]:
        """Parts of the loss on held-out rows, over all ranks."""
        from ctrlray.train.worker import sum_over_ranks

        totals = self.labels.totals(self.held_out)
        parts: dict[str, float] = {}
        for micro in self.labels.shards(self.held_out, self.ranks, self.task.settings.micro_batch_tokens)[self.rank]:
            batch = self.labels.collate(micro)
            for name, value in label_loss(self.trainer.measure(batch), batch, **totals).parts.items():
                parts[name] = parts.get(name, 0.0) + float(value)
        return sum_over_ranks(parts, self.ranks)
