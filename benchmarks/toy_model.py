"""A toy Llama that learns a toy world by the real path, and is sampled and judged in this process.

Real are distillation, tree rows, the order of steps, the Learner with its losses, and the grid's metrics. Toys are the world,
the network, the bare AdamW loop in place of DeepSpeed, and sampling by transformers in place of vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.toy_world import ASSISTANT, ATTRIBUTES, END, LENGTH, NUM_WORDS, PAD, ToyWorld, favourite_share, rewards
from ctrlray import config, schema
from ctrlray.distill import Distilled, distill
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.schema import Message
from ctrlray.train.batches import TrainExample, collate, epoch_steps, load_example, tree_rows
from ctrlray.train.models import Learner

CONTEXT = 64

Asked = tuple[list[Message], tuple[int, ...], int]
"""A prompt, a setting, and the number of the sample."""


@dataclass(frozen=True)
class ToyRecipe:
    """Settings of the toy's two trainings, the same for every objective."""

    base_epochs: int = 6
    rate: float = 6e-3
    batch_size: int = 32
    hidden: int = 32
    max_examples: int = 640
    counterfactuals: int = 1
    strategy: Literal["none", "balance"] = "balance"
    """Not `moec`: without the outer quantiles' preference every cell, the middle one too, has examples."""


@dataclass
class ToyBench:
    """A world, its starting model and its training examples: what the objectives of one seed share."""

    world: ToyWorld
    recipe: ToyRecipe = ToyRecipe()

    @cached_property
    def pool(self) -> pa.Table:
        """The world's scored answers."""
        return self.world.pool()

    @cached_property
    def distilled(self) -> Distilled:
        """The pool's training examples, with wrong codes for ExMATE."""
        settings = config.Distill(
            strategy=self.recipe.strategy,
            max_examples=self.recipe.max_examples,
            counterfactuals=self.recipe.counterfactuals,
        )
        return distill(self.pool, self.world.control, settings, self.world.seed)

    @cached_property
    def start(self) -> LlamaForCausalLM:
        """A Llama from scratch that has learned the whole pool without codes: the aligned model to start from."""
        render, recipe = self.world.render, self.recipe
        plain = [
            TrainExample((tuple(render(row["messages"])),), (tuple(row["token_ids"]),), 1.0, row["prompt_id"])
            for row in self.pool.to_pylist()
        ]
        network = toy_network(self.world, recipe.hidden)
        fit(network, plain, config.CLM(), recipe.base_epochs, recipe.rate, recipe.batch_size, self.world.seed)
        return network

    def examples(self, *, shuffled: bool = False) -> list[TrainExample]:
        """Training examples with their prompts rendered; `shuffled` deals the codes out at random, so no dial can be learned."""
        table = self.distilled.examples
        table = table.filter(pa.compute.equal(table["split"], "train"))
        if shuffled:
            order = np.random.default_rng(self.world.seed).permutation(table.num_rows)
            for name in (f"level_{a}" for a in ATTRIBUTES):
                table = table.set_column(table.schema.get_field_index(name), name, table[name].take(pa.array(order)))
        return [load_example(row, ATTRIBUTES, self.world.render) for row in table.to_pylist()]

    def trained(self, objective: config.Objective, epochs: int, *, shuffled: bool = False) -> LlamaForCausalLM:
        """A copy of the starting model, fine-tuned whole."""
        network = copy.deepcopy(self.start)
        examples = self.examples(shuffled=shuffled)
        fit(network, examples, objective, epochs, self.recipe.rate, self.recipe.batch_size, self.world.seed)
        return network

    def grid(self, network: LlamaForCausalLM, method: str, samples: int) -> pa.Table:
        """Answers to the held-out prompts at every setting, scored: the evaluation grid."""
        asked = self._asked(samples)
        answers = sample(network, [self.world.render(m, cell) for m, cell, _ in asked], self.world.seed)
        return self._scored(asked, answers, method)

    def perfect_grid(self, samples: int) -> pa.Table:
        """The same grid answered under perfect control."""
        rng = np.random.default_rng((self.world.seed, 2))
        asked = self._asked(samples)
        answers = [self.world.answer(m, self.world.perfect_counts(cell, rng), rng) for m, cell, _ in asked]
        return self._scored(asked, answers, "perfect")

    def _asked(self, samples: int) -> list[Asked]:
        return [(m, cell, s) for m in self.world.prompts()[1] for cell in self.world.space.cells() for s in range(samples)]

    def _scored(self, asked: Sequence[Asked], answers: Sequence[list[int]], method: str) -> pa.Table:
        scores_N2 = rewards(answers)
        columns: dict[str, Any] = {
            "prompt_id": [schema.prompt_id(m) for m, _, _ in asked],
            "method": [method] * len(asked),
            "sample": [s for _, _, s in asked],
            "text": [" ".join(map(str, a)) for a in answers],
            "num_tokens": [len(a) for a in answers],
            "finish_reason": ["stop" if a[-1:] == [END] else "length" for a in answers],
            "favourites": [favourite_share(m, a) for (m, _, _), a in zip(asked, answers, strict=True)],
        }
        for i, name in enumerate(ATTRIBUTES):
            columns[f"requested_{name}"] = [cell[i] for _, cell, _ in asked]
            columns[f"units_{name}"] = self.distilled.levels[name].units(scores_N2[:, i])
        return pa.table(columns)

    def judged(self, grid: pa.Table, num_bootstrap: int = 1) -> dict[str, Any]:
        """Metrics of a grid that holds one method, and the share of words that are the prompt's favourites."""
        (found,) = evaluate_grid(grid, self.world.control, num_bootstrap, self.world.seed).values()
        return found | {"favourites": float(grid["favourites"].to_numpy().mean())}


def toy_network(world: ToyWorld, hidden: int) -> LlamaForCausalLM:
    """Two random layers; the control tokens stand after the words."""
    settings = LlamaConfig(
        vocab_size=NUM_WORDS + len(world.space.tokens),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=ASSISTANT,
        eos_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(world.seed)
        return LlamaForCausalLM(settings)


def fit(
    network: LlamaForCausalLM,
    examples: Sequence[TrainExample],
    objective: config.Objective,
    epochs: int,
    rate: float,
    batch_size: int,
    seed: int,
) -> list[float]:
    """Train every weight with AdamW; each step is one micro batch. Returns the loss of each step."""
    from ctrlray.train.engine import learning_rate_factor

    own = network.config._attn_implementation
    learner = Learner(network.train(), objective, torch.float32)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    groups = [e.group for e in examples]
    steps = [step for epoch in range(epochs) for step in epoch_steps(groups, batch_size, seed, epoch)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, len(steps), 0.1))
    wrong, losses = objective.type == "exmate" and objective.weight > 0, []
    for step in steps:
        # a prompt of five tokens is cheaper to read twice than to mask; right and wrong branches give the same loss either way
        rows = tree_rows([(i, examples[i]) for i in step], wrong=wrong, share=False)
        branches = [b for row in rows for b in row.branches]
        num_tokens = sum(b.weight * len(b.token_ids) for b in branches if b.right)
        loss = learner(collate(rows, PAD), num_tokens=num_tokens, num_wrong=sum(not b.right for b in branches))
        optimizer.zero_grad()
        loss.total.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.total.item())
    network.set_attn_implementation(own)  # sampling reads padded rows, not trees
    return losses


@torch.no_grad()
def sample(network: LlamaForCausalLM, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """One answer to each prompt at temperature 1, control tokens masked as in the engine; prompts are equally long."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LENGTH + 6,
        eos_token_id=END,
        pad_token_id=PAD,
        suppress_tokens=list(range(NUM_WORDS, network.config.vocab_size)),
    )
    ids = torch.tensor([list(p) for p in prompts])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = network.eval().generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    answers = out[:, ids.shape[1] :].tolist()
    return [a[: a.index(END) + 1] if END in a else a for a in answers]
