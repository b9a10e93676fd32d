"""From examples to forward passes: tree rows, steps, micro batches. Pure; every rank computes the same plan.

A tree row holds a prompt once and its answers as branches:

    [prompt][code a][answer 1][code b][answer 1][code c][answer 2] ...
     0..P-1  P..               P..               P..                   positions restart at P in each branch

A token sees the prompt and its own branch. One branch per row is the ordinary sequence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ctrlray.schema import Message


class Branch(NamedTuple):
    """One answer under one code."""

    code_ids: tuple[int, ...]
    """What follows the shared prompt, before the answer."""
    token_ids: tuple[int, ...]
    right: bool
    """Under its own code (CLM's part); else a wrong pair (ExMATE's penalty)."""
    weight: float
    example: int
    """Index of the example it belongs to."""


@dataclass(frozen=True)
class TreeRow:
    """A shared prompt and its branches."""

    prompt_ids: tuple[int, ...]
    branches: tuple[Branch, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the row."""
        return len(self.prompt_ids) + sum(len(b.code_ids) + len(b.token_ids) for b in self.branches)


@dataclass(frozen=True)
class TrainExample:
    """An example with its prompts rendered: `codes[i]` are full prompt ids of branch i, the right one first."""

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    weight: float
    group: str
    """Examples of one group share a prompt."""


Render = Callable[[Sequence[Message], Sequence[int]], list[int]]


def load_example(row: dict[str, Any], names: Sequence[str], render: Render) -> TrainExample:
    """One row of the examples table, its own code first, then its counterfactuals."""
    own = [row[f"level_{n}"] for n in names]
    levels = [own, *(c["levels"] for c in row["counterfactuals"])]
    answers = [row["token_ids"], *(c["token_ids"] for c in row["counterfactuals"])]
    prompts = tuple(tuple(render(row["messages"], lv)) for lv in levels)
    return TrainExample(prompts, tuple(tuple(a) for a in answers), float(row["weight"]), row["prompt_id"])


def tree_rows(examples: Sequence[tuple[int, TrainExample]], *, wrong: bool, share: bool) -> list[TreeRow]:
    """Rows of the given (index, example) pairs; `share` puts all branches of one prompt in one row."""
    flat: dict[Any, list[tuple[tuple[int, ...], Branch]]] = {}
    for index, example in examples:
        count = len(example.prompts) if wrong else 1
        for i in range(count):
            branch = Branch((), example.responses[i], i == 0, example.weight, index)
            key = example.group if share else (index, i)
            flat.setdefault(key, []).append((example.prompts[i], branch))
    rows = []
    for members in flat.values():
        shared = _common_prefix([p for p, _ in members])
        branches = tuple(b._replace(code_ids=p[len(shared) :]) for p, b in members)
        rows.append(TreeRow(shared, branches))
    return sorted(rows, key=lambda r: r.prompt_ids)  # one order, whichever order the examples came in


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Longest shared beginning; at least one token stays outside, because the answer's first token is predicted from it."""
    shortest = min(map(len, prompts)) - 1
    first = prompts[0]
    size = next((i for i in range(shortest) if any(p[i] != first[i] for p in prompts)), shortest)
    return first[:size]


def epoch_steps(groups: Sequence[str], batch_size: int, seed: int, epoch: int, per_row: int = 4) -> list[list[int]]:
    """Example indices of each optimizer step of one epoch.

    Up to `per_row` examples of one prompt stay together, because they share its pass; these bundles are shuffled.
    """
    rng = random.Random(f"{seed}:{epoch}")
    by_group: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        by_group.setdefault(group, []).append(i)
    bundles = []
    for members in by_group.values():
        rng.shuffle(members)
        bundles += [members[i : i + per_row] for i in range(0, len(members), per_row)]
    rng.shuffle(bundles)
    order = [i for bundle in bundles for i in bundle]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def planned_steps(groups: Sequence[str], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Example indices of each optimizer step of a whole training; the last epoch may be a part of one."""
    whole = math.ceil(epochs)
    steps = [step for epoch in range(whole) for step in epoch_steps(groups, batch_size, seed, epoch)]
    return steps[: max(1, round(len(steps) / max(1, whole) * epochs))]


class Sized(Protocol):
    """What `shard` deals out: a row of known length, which stays whole."""

    @property
    def num_tokens(self) -> int:
        """Its padded tokens."""
        ...


R = TypeVar("R", bound=Sized)


def shard(rows: Sequence[R], ranks: int, max_tokens: int) -> list[list[list[R]]]:
    """`[rank][micro batch][row]`: length-sorted rows, equal numbers of micro batches on every rank.

    A micro batch holds at most `max_tokens` padded tokens, or one longer row. Short ranks get empty micro batches,
    because sharded engines need every rank in every collective.
    """
    ordered = sorted(rows, key=lambda r: -r.num_tokens)
    load = [0] * ranks
    dealt: list[list[R]] = [[] for _ in range(ranks)]
    for row in ordered:
        rank = load.index(min(load))
        load[rank] += row.num_tokens
        dealt[rank].append(row)
    batches = [list(_micro_batches(mine, max_tokens)) for mine in dealt]
    most = max(map(len, batches))
    return [b + [[] for _ in range(most - len(b))] for b in batches]


def _micro_batches(rows: Sequence[R], max_tokens: int) -> Iterator[list[R]]:
    batch: list[R] = []
    for row in rows:  # longest first, so the first row sets the padded length
        if batch and batch[0].num_tokens * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class Batch(NamedTuple):
    """Tensors of one micro batch. Rows R of padded length S; N branches with up to T answer tokens."""

    input_ids_RS: Tensor
    position_ids_RS: Tensor
    allowed_RSS: Tensor
    """True where a query (second axis) may see a key (third axis)."""
    source_NT: Tensor
    """Flat index (row x S + column) of the position that predicts each answer token."""
    target_NT: Tensor
    mask_NT: Tensor
    right_N: Tensor
    weight_N: Tensor
    example_N: Tensor


def collate(rows: Sequence[TreeRow], pad_id: int) -> Batch:
    """Tensors of a micro batch; an empty one becomes a single padding token without answers."""
    if not rows:
        rows = [TreeRow((pad_id,), ())]
    length = max(r.num_tokens for r in rows)
    ids = torch.full((len(rows), length), pad_id)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    member = torch.full((len(rows), length), -1)  # branch of each token: 0 prompt, 1.. branches, -1 padding
    spans: list[tuple[Branch, int]] = []
    for r, row in enumerate(rows):
        size = len(row.prompt_ids)
        ids[r, :size] = torch.tensor(row.prompt_ids)
        positions[r, :size] = torch.arange(size)
        member[r, :size] = 0
        start = size
        for number, branch in enumerate(row.branches, 1):
            tokens = branch.code_ids + branch.token_ids
            stop = start + len(tokens)
            ids[r, start:stop] = torch.tensor(tokens)
            positions[r, start:stop] = torch.arange(size, size + len(tokens))
            member[r, start:stop] = number
            spans.append((branch, r * length + start + len(branch.code_ids) - 1))
            start = stop
    return Batch(ids, positions, _allowed(member), *_answers(spans))


def _allowed(member_RS: Tensor) -> Tensor:
    query, key = member_RS[:, :, None], member_RS[:, None, :]
    steps = torch.arange(member_RS.shape[1])
    causal = steps[None, :, None] >= steps[None, None, :]
    seen = causal & ((key == 0) | (key == query)) & (key >= 0)
    # a padding query sees itself: a row without any key would give NaN
    return seen | (torch.eye(member_RS.shape[1], dtype=torch.bool)[None] & (query < 0))


def _answers(spans: Sequence[tuple[Branch, int]]) -> tuple[Tensor, ...]:
    width = max((len(b.token_ids) for b, _ in spans), default=1)
    shape = (len(spans), width)
    source, target = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape)
    for i, (branch, start) in enumerate(spans):
        size = len(branch.token_ids)
        source[i, :size] = torch.arange(start, start + size)
        target[i, :size] = torch.tensor(branch.token_ids)
        mask[i, :size] = 1
    right = torch.tensor([b.right for b, _ in spans], dtype=torch.bool)
    weight = torch.tensor([b.weight for b, _ in spans])
    example = torch.tensor([b.example for b, _ in spans], dtype=torch.long)
    return source, target, mask, right, weight, example
