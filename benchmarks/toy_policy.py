"""A toy Llama that learns a toy world by reinforcement, by the real path, in this process: no Ray, no vLLM, no DeepSpeed.

Real are the order of prompts and settings, the producer with its table of rollouts, rewards in level units, advantages, and the
policy with its reference, critic and losses. Toys are the world, the network, sampling by transformers in place of engines,
a function of words as reward, without its actors, and the bare AdamW loop in place of DeepSpeed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.toy_model import CONTEXT, ToyBench, sample
from benchmarks.toy_world import ATTRIBUTES, END, LENGTH, NUM_WORDS, PAD, text_of
from ctrlray import config, schema
from ctrlray.engine.engine import Completion
from ctrlray.rewards.base import Floats
from ctrlray.rewards.registry import build
from ctrlray.rewards.rows import score_rows
from ctrlray.schema import Message
from ctrlray.tables import Storage
from ctrlray.train.batches import Batch, epoch_steps, tree_rows
from ctrlray.train.ppo import batch as b
from ctrlray.train.ppo.policy import Policy, PolicyBatch, load_policy, policy_groups
from ctrlray.train.ppo.rollouts import ROLLOUTS, Producer, Prompts, part

SAMPLING = config.Sampling(max_tokens=LENGTH + 6, temperature=1.0, min_p=0.0)
"""What `sample` does."""
Point = dict[str, float]


class ToyEngines:
    """The learner's own network in the place of an engine pool: its weights are always the newest."""

    def __init__(self, network: LlamaForCausalLM, attention: str, seed: int) -> None:
        self._network, self._attention, self._seed = network, attention, seed
        self.weights_version = 0

    def generate(self, prompts: Sequence[Sequence[int]], sampling: config.Sampling, batch_size: int) -> list[Completion]:
        """One answer per prompt, all in one batch."""
        trees = self._network.config._attn_implementation
        self._network.set_attn_implementation(self._attention)  # sampling reads padded rows, not trees
        answers = sample(self._network, prompts, self._seed + self.weights_version)
        self._network.set_attn_implementation(trees)
        version = self.weights_version
        return [Completion(text_of(a), a, math.nan, "stop" if a[-1:] == [END] else "length", [], version) for a in answers]

    def hit_rate(self) -> float:
        """There is no cache."""
        return math.nan


class ToyRewards:
    """A reward in this process in the place of a pool of actors."""

    def __init__(self, reward: config.Reward) -> None:
        self._scorer = build(reward)

    def score(
        self, chats: Sequence[Sequence[Message]], texts: Sequence[str], batch_size: int
    ) -> tuple[dict[str, Floats], list[str]]:
        """Scores by output, and an error per answer."""
        return score_rows(self._scorer, chats, texts)


def reinforced(bench: ToyBench, objective: config.PPO, start: LlamaForCausalLM) -> tuple[LlamaForCausalLM, list[Point]]:
    """A copy of `start`, trained whole, and what each step reported."""
    world, own = bench.world, start.config._attn_implementation
    job = _job(bench, objective)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = str(Path(scratch) / "start"), Storage(str(Path(scratch) / "out"))
        start.save_pretrained(folder)
        codes = range(NUM_WORDS, start.config.vocab_size)
        with torch.random.fork_rng():
            torch.manual_seed(world.seed)
            policy = load_policy(folder, objective, job.train, codes, "float32", "cpu")
        engines, learner, curves = ToyEngines(policy.network, own, world.seed), _Learner(policy, job), []
        producer = _producer(bench, job, objective, engines, out)
        for step in range(objective.steps):
            producer.make(step, {})
            table = out.read_part(ROLLOUTS, part(step), schema.rollouts(ATTRIBUTES))
            curves.append(learner.step(step, b.Rollouts.of(table.to_pylist(), ATTRIBUTES, objective.weights)))
            engines.weights_version = step + 1
    policy.network.set_attn_implementation(own)
    trained: LlamaForCausalLM = policy.network
    return trained, curves


def _job(bench: ToyBench, objective: config.PPO) -> config.Job:
    """What the real path reads of a job. One optimizer step takes all of a step's answers."""
    size = objective.rollouts_per_step
    return config.Job(
        name="toy",
        seed=bench.world.seed,
        control=bench.world.control,
        rewards=(config.FunctionReward(target="benchmarks.toy_world:text_rewards", attributes=ATTRIBUTES),),
        prompts=config.Prompts(train=bench.world.num_prompts),
        train=config.Train(objectives=(objective,), lora=None, batch_size=size, micro_batch_tokens=size * CONTEXT),
    )


def _producer(bench: ToyBench, job: config.Job, objective: config.PPO, engines: ToyEngines, out: Storage) -> Producer:
    world = bench.world
    chats = {schema.prompt_id(m): m for m in world.prompts()[0]}
    rows = [{"prompt_id": key, "messages": m} for key, m in chats.items()]
    order = Prompts(rows, world.space, cast(Any, world), objective, CONTEXT, job.seed)  # the world renders
    rewards = ToyRewards(job.rewards[0])
    return Producer(order, chats, job, objective, bench.distilled.levels, cast(Any, engines), cast(Any, rewards), out)


class _Learner:
    """A step of ctrlray.train.ppo.loop on one rank, in one micro batch, without storage and DeepSpeed."""

    def __init__(self, policy: Policy, job: config.Job) -> None:
        self._policy, self._objective, self._settings, self._seed = policy, policy.objective, job.train, job.seed
        self._kl = policy.objective.kl.coefficient
        groups = policy_groups(policy, job.train)
        self._rates = [g["lr"] for g in groups]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def step(self, step: int, rollouts: b.Rollouts) -> Point:
        """Advantages of a step's rollouts, then its epochs."""
        o, s = self._objective, self._settings
        measured = step == o.steps - 1 or (step + 1) % s.eval_every == 0
        batches = [
            chosen
            for epoch in range(o.epochs)
            for chosen in epoch_steps(rollouts.prompts, s.batch_size, self._seed, step * o.epochs + epoch)
        ]
        names = b.channels(o, self._kl, on_policy=len(batches) == 1, measured=measured)
        scored = self._scored(rollouts, names)
        targets = b.targets(o, rollouts, scored, self._kl)
        point = b.facts(o, ATTRIBUTES, rollouts, scored, targets)
        rate = min(1.0, (step + 1) / max(1, round(s.warmup * o.steps)))
        for group, base in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        learns = o.advantage != "gae" or step >= o.critic.warmup_steps
        parts = [self._update(rollouts, targets, chosen, learns) for chosen in batches]
        if "kl" in point:
            self._kl = b.next_coefficient(o.kl, self._kl, point["kl"], len(rollouts))
        return {"step": step + 1, **point, **parts[-1]}

    def _update(self, rollouts: b.Rollouts, targets: Mapping[str, Tensor], chosen: Sequence[int], learns: bool) -> Point:
        tree = self._tree(rollouts, chosen)
        width = tree.mask_NT.shape[1]
        batch = PolicyBatch(tree, *(targets[n][tree.example_N, :width] for n in PolicyBatch._fields[1:]))
        loss = self._policy(batch, num_tokens=float(tree.mask_NT.sum()), learns_policy=learns, kl=self._kl)
        self._optimizer.zero_grad()
        loss.total.backward()
        nn.utils.clip_grad_norm_(self._policy.parameters(), self._settings.max_grad_norm)
        self._optimizer.step()
        return {name: float(value) for name, value in loss.parts.items()}

    def _scored(self, rollouts: b.Rollouts, names: Sequence[str]) -> dict[str, Tensor]:
        if not names:
            return {}
        tree = self._tree(rollouts, range(len(rollouts)))
        values_CNT = self._policy(tree, channels=tuple(names))
        return dict(zip(names, rollouts.spread([(tree.example_N, values_CNT)], len(names)), strict=True))

    def _tree(self, rollouts: b.Rollouts, chosen: Sequence[int]) -> Batch:
        rows = tree_rows([(i, rollouts.examples[i]) for i in chosen], wrong=False, share=self._policy.shares)
        return self._policy.collated(rows, PAD)
