"""Which pairs of answers raters see, on which side and in which order. Pure; what looks random follows hashes of the seed.

    answers ─► pairs to one prompt, by one method, at different levels ─► an even share of each contrast ─► sides ─► order

Items are spread evenly over methods, then over the attributes that differ, then over the levels that meet, then over the
levels of the other attributes, and within those over prompts. Each attribute's higher level stands as often on side A as
on side B, by method, to within one wherever pairs differ in one attribute.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ctrlray.distill import water_fill
from ctrlray.schema import digest

Which = Literal["any", "ends"]


@dataclass(frozen=True)
class Answer:
    """One answer that may be shown, with what raters must not know."""

    row_id: str
    prompt_id: str
    group: str
    """The method that gave it; `pool` for training rows."""
    levels: tuple[int, ...]
    """Requested (grid) or labelled (pool) levels in control order."""
    text: str
    scores: Mapping[str, Mapping[str, float]]
    """`{"reward": {"safety": 1.3}}`: by who scored and by attribute."""


class Pair(NamedTuple):
    """One item: the answers on sides A and B."""

    item_id: str
    a: Answer
    b: Answer


class Contrast(NamedTuple):
    """Two answers of which neither has a side yet, and what kind of contrast they are, coarse to fine."""

    one: Answer
    other: Answer
    kind: tuple[Any, ...]


class Drawn(NamedTuple):
    """The items in the order in which they are shown, how many pairs there were to draw from, and what was left out."""

    pairs: list[Pair]
    num_contrasts: int
    left_out: dict[str, int]


def draw_pairs(answers: Sequence[Answer], num_items: int, seed: int, which: Which = "any", single: bool = True) -> Drawn:
    """At most `num_items` pairs. `ends` takes an attribute's lowest against its highest level only.

    `single` keeps to pairs that differ in one attribute. Left out: answers without text, and pairs of one text.
    """
    usable = [a for a in answers if a.text.strip()]
    contrasts, same_text = _contrasts(usable, which, single)
    left_out = {"answers without text": len(answers) - len(usable), "pairs of one text": same_text}
    chosen = _spread(contrasts, num_items, Counter(), seed, 0)
    pairs = sorted(_sided(chosen, seed), key=lambda p: digest(seed, "order", p.item_id))
    return Drawn(pairs, len(contrasts), {reason: n for reason, n in left_out.items() if n})


def _contrasts(answers: Sequence[Answer], which: Which, single: bool) -> tuple[list[Contrast], int]:
    ends = [{min(level), max(level)} for level in zip(*(a.levels for a in answers), strict=True)]
    by_prompt: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda a: a.row_id):
        by_prompt[answer.group, answer.prompt_id].append(answer)
    found, same_text = [], 0
    for one, other in (pair for given in by_prompt.values() for pair in itertools.combinations(given, 2)):
        axes = tuple(i for i, (x, y) in enumerate(zip(one.levels, other.levels, strict=True)) if x != y)
        if not axes or (single and len(axes) > 1):
            continue
        if which == "ends" and any({one.levels[i], other.levels[i]} != ends[i] for i in axes):
            continue
        if one.text.strip() == other.text.strip():
            same_text += 1
            continue
        meet = tuple(sorted(tuple(a.levels[i] for i in axes) for a in (one, other)))
        rest = tuple(level for i, level in enumerate(one.levels) if i not in axes)
        found.append(Contrast(one, other, (one.group, axes, meet, rest)))
    return found, same_text


def _spread(contrasts: Sequence[Contrast], budget: int, uses: Counter[str], seed: int, depth: int) -> list[Contrast]:
    """An even share of each kind at this depth, and so on within it; a kind that has too few leaves the others more."""
    if not contrasts:
        return []
    if depth == len(contrasts[0].kind):
        return _least_used(contrasts, budget, uses, seed)
    kinds: dict[Any, list[Contrast]] = defaultdict(list)
    for contrast in contrasts:
        kinds[contrast.kind[depth]].append(contrast)
    order = sorted(kinds, key=lambda k: digest(seed, "kind", depth, contrasts[0].kind[:depth], k))
    shares = water_fill([len(kinds[k]) for k in order], budget)
    return [c for k, share in zip(order, shares, strict=True) for c in _spread(kinds[k], share, uses, seed, depth + 1)]


def _least_used(contrasts: Sequence[Contrast], budget: int, uses: Counter[str], seed: int) -> list[Contrast]:
    left = sorted(contrasts, key=lambda c: digest(seed, "pair", c.one.row_id, c.other.row_id))
    chosen = []
    for _ in range(min(budget, len(left))):
        contrast = min(left, key=lambda c: uses[c.one.prompt_id])
        left.remove(contrast)
        uses[contrast.one.prompt_id] += 1
        chosen.append(contrast)
    return chosen


def _sided(contrasts: Sequence[Contrast], seed: int) -> list[Pair]:
    """Give each pair its sides: those that keep the higher levels balanced; by hash where both do."""
    named = {digest(seed, "item", c.one.group, c.one.row_id, c.other.row_id, length=12): c for c in contrasts}
    surplus: Counter[tuple[str, int]] = Counter()  # times that the higher level stood on side A, less those on side B
    pairs = []
    for name in sorted(named, key=lambda n: digest(seed, "turn", n)):
        one, other, (group, axes, *_) = named[name]
        sign = {i: 1 if one.levels[i] > other.levels[i] else -1 for i in axes}
        lean = sum(surplus[group, i] * s for i, s in sign.items())
        swap = lean > 0 or (lean == 0 and int(digest(seed, "side", name), 16) % 2 == 1)
        for i, s in sign.items():
            surplus[group, i] += -s if swap else s
        pairs.append(Pair(f"q{name}", *((other, one) if swap else (one, other))))
    return pairs
