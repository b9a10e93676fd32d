"""Rollouts of one step: which prompts under which settings, their answers by the engines, what the rewards make of them."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ctrlray import config, schema
from ctrlray.control import ControlSpace, Levels, Renderer
from ctrlray.distill import Levels as LevelScale
from ctrlray.engine.engine import Completion
from ctrlray.engine.pool import EnginePool
from ctrlray.errors import DataError
from ctrlray.ledger import count
from ctrlray.rewards.pool import RewardPool
from ctrlray.rewards.rows import weighted
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import current, warn

ROLLOUTS = "rollouts"
ENGINE_DIED, ALONE, NOT_FINITE = "engine_died", "alone_in_group", "not_finite"


class Ask(NamedTuple):
    """One answer to be sampled."""

    rollout_id: str
    prompt_id: str
    group: int
    """Answers of one group share prompt and setting."""
    sample: int
    levels: Levels
    plain_ids: list[int]
    """The prompt without its code."""
    prompt_ids: list[int]


class Prompts:
    """The training prompts in the order in which steps use them: shuffle after shuffle, so none comes twice before all did."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        space: ControlSpace,
        renderer: Renderer,
        ppo: config.PPO,
        max_context: int,
        seed: int,
    ) -> None:
        self._space, self._ppo, self._renderer, self._seed = space, ppo, renderer, seed
        longest = max_context - ppo.sampling.max_tokens
        ordered = sorted(rows, key=lambda p: str(p["prompt_id"]))
        lengths = [self._length(p["messages"]) for p in ordered]
        self._rows = [p for p, size in zip(ordered, lengths, strict=True) if size is not None and size <= longest]
        self.num_refused = lengths.count(None)
        """Prompts whose text reads as special tokens; generation has quarantined their answers, by name."""
        self.num_too_long = len(ordered) - len(self._rows) - self.num_refused
        self._cells = space.cells()
        self._weights = [self._chance(c) for c in self._cells]

    def _length(self, messages: Sequence[schema.Message]) -> int | None:
        try:
            return len(self._renderer.render(messages, self._space.cells()[0]))
        except DataError:
            return None

    def _chance(self, cell: Levels) -> float:
        chance = 1.0
        for name, level in zip(self._space.names, cell, strict=True):
            chance *= self._ppo.chances[name][level - 1] if name in self._ppo.chances else 1.0
        return chance

    @property
    def num_usable(self) -> int:
        """Prompts that can be rendered and leave room for an answer."""
        return len(self._rows)

    def asks(self, step: int) -> list[Ask]:
        """What a step samples; the same whenever it is asked."""
        first = step * self._ppo.prompts_per_step
        made: list[Ask] = []
        for place in range(first, first + self._ppo.prompts_per_step):
            prompt = self._at(place)
            plain = self._renderer.render(prompt["messages"])
            for cell in self._settings(place):
                group = len(made) // self._ppo.group_size
                ids = self._renderer.render(prompt["messages"], cell)
                made += [
                    Ask(schema.digest(self._seed, place, list(cell), i), prompt["prompt_id"], group, i, cell, plain, ids)
                    for i in range(self._ppo.group_size)
                ]
        return made

    def _at(self, place: int) -> Mapping[str, Any]:
        epoch, index = divmod(place, len(self._rows))
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}:prompts:{epoch}").shuffle(order)
        return self._rows[order[index]]

    def _settings(self, place: int) -> list[Levels]:
        """Different cells, drawn by their chances without replacement; fewer where fewer have a chance."""
        rng, left = random.Random(f"{self._seed}:settings:{place}"), list(range(len(self._cells)))
        chosen: list[Levels] = []
        while len(chosen) < self._ppo.settings_per_prompt and any(self._weights[i] for i in left):
            (pick,) = rng.choices(left, [self._weights[i] for i in left])
            left.remove(pick)
            chosen.append(self._cells[pick])
        return chosen


@dataclass
class Producer:
    """Makes the rollouts of each step and writes them, whole or not at all."""

    prompts: Prompts
    chats: Mapping[str, Sequence[schema.Message]]
    job: config.Job
    ppo: config.PPO
    scales: Mapping[str, LevelScale]
    engines: EnginePool
    rewards: RewardPool
    out: Storage

    def has(self, step: int) -> bool:
        """Whether a step's rollouts are there."""
        return self.out.exists(ROLLOUTS, f"{part(step)}.parquet")

    def make(self, step: int, notes: Mapping[str, float]) -> int:
        """Sample, score and write a step's rollouts; `notes` of the driver are kept with them. Returns the sampled tokens."""
        asks, began = self.prompts.asks(step), time.perf_counter()
        batch = min(self.job.generate.batch_size, math.ceil(len(asks) / self.job.generate.pool.max_size))
        answers = self.engines.generate([a.prompt_ids for a in asks], self.ppo.sampling, batch)
        sampled = time.perf_counter()
        rows = self._scored(step, asks, answers)
        dropped = count([r["error"] for r in rows if r["error"]])
        if sum(dropped.values()) == len(rows):
            raise DataError(f"ppo step {step + 1}: none of {len(rows)} rollouts can be trained on: {dropped}")
        if dropped:
            first = next(r["rollout_id"] for r in rows if r["error"])
            warn(current(), f"step {step + 1}: {dropped} of {len(rows)} rollouts are left out", first)
        accounts = {
            "generate_s": sampled - began,
            "score_s": time.perf_counter() - sampled,
            "prefix_hit_rate": self.engines.hit_rate(),
            "dropped": dropped,
            **notes,
        }
        self.out.write_json(accounts, ROLLOUTS, f"{part(step)}.json")
        names = [a.name for a in self.job.control.attributes]
        self.out.write_table(from_rows(rows, schema.rollouts(names)), ROLLOUTS, part(step))  # last: with it the step is complete
        return sum(len(r["token_ids"]) for r in rows)

    def _scored(self, step: int, asks: Sequence[Ask], answers: Sequence[Completion | None]) -> list[dict[str, Any]]:
        there = [i for i, a in enumerate(answers) if a is not None]
        chats = [self.chats[asks[i].prompt_id] for i in there]
        texts = [a.text.strip() for a in answers if a is not None]
        columns, errors = self.rewards.score(chats, texts, self.job.score.batch_size)
        scores = {a.name: weighted(columns, a.sources) for a in self.job.control.attributes}
        failed = dict(zip(there, (e.split(":")[0] for e in errors), strict=True))
        rows = []
        for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
            row = _row(step, ask, answer, self.engines.weights_version, list(scores))
            row["error"] = failed.get(i, ENGINE_DIED)
            if not row["error"]:
                at = there.index(i)
                for name, column in scores.items():
                    row[f"score_{name}"] = float(column[at])
                    row[f"units_{name}"] = float(self.scales[name].units(column[at : at + 1])[0])
                if not all(np.isfinite(row[f"units_{n}"]) for n in scores):
                    row["error"] = NOT_FINITE
            rows.append(row)
        if self.ppo.advantage != "gae":
            _leave_out_single(rows)
        return rows


def _row(step: int, ask: Ask, answer: Completion | None, version: int, names: Sequence[str]) -> dict[str, Any]:
    made = answer or Completion("", [], 0.0, ENGINE_DIED, [], version)
    nothing = {f"{kind}_{n}": float("nan") for kind in ("score", "units") for n in names}
    return nothing | {
        "rollout_id": ask.rollout_id,
        "step": step,
        "prompt_id": ask.prompt_id,
        "group": ask.group,
        "sample": ask.sample,
        "plain_ids": ask.plain_ids,
        "prompt_ids": ask.prompt_ids,
        "token_ids": made.token_ids,
        "logprobs": made.logprobs,
        "text": made.text,
        "finish_reason": made.finish_reason,
        "weights_version": made.weights_version,
        **{f"requested_{n}": level for n, level in zip(names, ask.levels, strict=True)},
    }


def _leave_out_single(rows: Sequence[dict[str, Any]]) -> None:
    """Answers that lost all others of their group have nothing to be compared with."""
    sizes = Counter(r["group"] for r in rows if not r["error"])
    for row in rows:
        if not row["error"] and sizes[row["group"]] == 1:
            row["error"] = ALONE


def part(step: int) -> str:
    """Name of a step's files."""
    return f"step-{step:06d}"
