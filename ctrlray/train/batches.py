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
    return rows


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
        """Its length."""
        ...


R = TypeVar("R", bound=Sized)


def shard(rows: Sequence[R], ranks: int, max_tokens: int, *, packed: bool = True) -> list[list[list[R]]]:
    """`[rank][micro batch][row]`: length-sorted rows, equal numbers of micro batches on every rank.

    A micro batch holds at most `max_tokens` tokens, padding included, or one longer row. Short ranks get empty micro
    batches, because sharded engines need every rank in every collective.
    """
    ordered = sorted(rows, key=lambda r: -r.num_tokens)
    load = [0] * ranks
    dealt: list[list[R]] = [[] for _ in range(ranks)]
    for row in ordered:
        rank = load.index(min(load))
        load[rank] += row.num_tokens
        dealt[rank].append(row)
    batches = [list(_packs(mine, max_tokens) if packed else _padded(mine, max_tokens)) for mine in dealt]
    most = max(map(len, batches))
    return [b + [[] for _ in range(most - len(b))] for b in batches]


def _packs(rows: Sequence[R], max_tokens: int) -> list[list[R]]:
    """First fit, longest first."""
    bins: list[list[R]] = []
    room: list[int] = []
    for row in rows:
        at = next((i for i, free in enumerate(room) if row.num_tokens <= free), None)
        if at is None:
            bins.append([row])
            room.append(max_tokens - row.num_tokens)
        else:
            bins[at].append(row)
            room[at] -= row.num_tokens
    return bins


def _padded(rows: Sequence[R], max_tokens: int) -> Iterator[list[R]]:
    batch: list[R] = []
    for row in rows:  # longest first, so the first row sets the padded length
        if batch and batch[0].num_tokens * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class Batch(NamedTuple):
    """Tensors of one micro batch: R = 1 packed row, or R padded sequences of one branch each; N branches, T answer tokens."""

    input_ids_RS: Tensor
    position_ids_RS: Tensor
    present_RS: Tensor
    """True where a token is, False on padding."""
    spans_K4: Tensor
    """Segments of a packed row, `[start, stop, prefix start, prefix stop]`: a prompt (its prefix is empty) or a branch."""
    source_NT: Tensor
    """Flat index (row x S + column) of the position that predicts each answer token."""
    target_NT: Tensor
    mask_NT: Tensor
    right_N: Tensor
    weight_N: Tensor
    example_N: Tensor


def collate(rows: Sequence[TreeRow], pad_id: int, *, packed: bool = True, multiple: int = 1) -> Batch:
    """Tensors of a micro batch; an empty one becomes a single padding token without answers.

    `packed`: all rows in one, filled up to a multiple of `multiple`. Otherwise rows of one branch, padded on the right.
    """
    rows = rows or [TreeRow((pad_id,), ())]
    lines = [_line(r) for r in rows]
    if packed:
        lines = [_joined(lines)]
        size = len(lines[0].ids)
        lines = [_joined([lines[0], _filler(-size % multiple, pad_id)])]
    elif any(len(r.branches) > 1 for r in rows):
        raise ValueError("rows of several branches need a packed batch")
    length = max(len(line.ids) for line in lines)
    ids, positions = torch.full((len(lines), length), pad_id), torch.zeros((len(lines), length), dtype=torch.long)
    present = torch.zeros((len(lines), length), dtype=torch.bool)
    for i, line in enumerate(lines):
        ids[i, : len(line.ids)] = torch.tensor(line.ids)
        positions[i, : len(line.ids)] = torch.tensor(line.positions)
        present[i, : len(line.ids)] = True
    answers = [(b, i * length + start) for i, line in enumerate(lines) for b, start in line.answers]
    spans = torch.tensor([s for line in lines for s in line.spans])
    return Batch(ids, positions, present, spans, *_answers(answers))


class _Line(NamedTuple):
    """One row as lists."""

    ids: list[int]
    positions: list[int]
    spans: list[list[int]]
    answers: list[tuple[Branch, int]]
    """Each branch, and the column that predicts its answer's first token."""


def _line(row: TreeRow) -> _Line:
    size = len(row.prompt_ids)
    line = _Line(list(row.prompt_ids), list(range(size)), [[0, size, 0, 0]] if size else [], [])
    for branch in row.branches:
        start = len(line.ids)
        line.ids.extend(branch.code_ids + branch.token_ids)
        line.positions.extend(range(size, size + len(line.ids) - start))
        line.spans.append([start, len(line.ids), 0, size])
        line.answers.append((branch, start + len(branch.code_ids) - 1))
    return line


def _filler(size: int, pad_id: int) -> _Line:
    return _Line([pad_id] * size, list(range(size)), [[0, size, 0, 0]] if size else [], [])


def _joined(lines: Sequence[_Line]) -> _Line:
    made = _Line([], [], [], [])
    for line in lines:
        at = len(made.ids)
        made.ids.extend(line.ids)
        made.positions.extend(line.positions)
        made.spans.extend([a + at, b + at, *([c + at, d + at] if d > c else [0, 0])] for a, b, c, d in line.spans)
        made.answers.extend((branch, start + at) for branch, start in line.answers)
    return made


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
