"""Which scored answers become training examples: scores to levels, levels to cells, a reason for every answer left out.

A *cell* is one answer's levels in control order, written "3,1". Everything here is a pure function of its arguments:
choices that look random follow hashes of the seed and the row's id, so neither row order nor a library's random stream
matters. Nothing is read or written here. Shape key: N pool rows, A attributes.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ctrlray import config, schema
from ctrlray.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Cell = tuple[int, ...]

POOL_COLUMNS = ("response_id", "prompt_id", "messages", "text", "token_ids", "finish_reason")
NUM_KNOTS = 201
SLACK = 1e-9  # a quantile that rounding left just above a level's upper edge still belongs to that level
MAX_WEIGHT = 2.0

HINTS = {
    "truncated": "raise generate.sampling.max_tokens, add a behaviour that asks for short answers, or set distill.keep_truncated",
    "empty": "look at the responses table: the model answered with blank text",
    schema.SPECIAL_TOKENS: "the model samples special tokens in its answers: lower generate.sampling.temperature or raise min_p",
    "duplicate": "raise generate.sampling.temperature or add behaviours",
    "single_answer": "raise generate.samples, or set distill.labels: global",
    "inner_quantile": "raise distill.outer, or choose distill.strategy: balance",
}


@dataclass(frozen=True)
class Levels:
    """Global quantiles of one attribute's scores in the pool; stored with the run, they turn any score into levels.

    `scores` (rising) and `cdf` are knots of the pool's distribution. At a knot the CDF is the mid-CDF
    P(s < knot) + P(s = knot) / 2, exactly; between knots it is linear; below the first it is 0, above the last 1. A
    pool of up to 201 distinct scores is stored whole, a larger one at 201 steps of equal mass, each with the score
    before it (so that a score that many answers share does not bend the line on its left).
    """

    num_levels: int
    scores: tuple[float, ...]
    cdf: tuple[float, ...]

    @classmethod
    def fit(cls, scores: ArrayLike, num_levels: int) -> Levels:
        """Quantiles of the pool's scores; raises DataError when there are none or one is not finite."""
        values = _finite(scores).ravel()
        if not values.size:
            raise DataError("levels: no scores to fit quantiles on; rerun the score stage")
        distinct, counts = np.unique(values, return_counts=True)
        mid = (np.cumsum(counts) - counts / 2) / values.size
        if distinct.size > NUM_KNOTS:
            at = np.searchsorted(mid, np.linspace(mid[0], mid[-1], NUM_KNOTS))
            keep = np.union1d(at, np.maximum(at - 1, 0))
            distinct, mid = distinct[keep], mid[keep]
        return cls(num_levels, tuple(distinct.tolist()), tuple(mid.tolist()))

    def quantile(self, scores: ArrayLike) -> Floats:
        """F(s): the share of the pool below the score, ties counted half; in [0, 1]."""
        return np.asarray(np.interp(_finite(scores), self.scores, self.cdf, left=0.0, right=1.0), np.float64)

    def units(self, scores: ArrayLike) -> Floats:
        """Continuous level units 0.5 + L F(s), in [0.5, L + 0.5]; level k covers the units from k - 0.5 to k + 0.5."""
        return 0.5 + self.num_levels * self.quantile(scores)

    def level(self, scores: ArrayLike) -> Ints:
        """Levels 1..L, each holding the same share of the pool as far as ties allow."""
        return _bins(self.quantile(scores), self.num_levels)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; floats survive the round trip exactly."""
        return {"num_levels": self.num_levels, "scores": list(self.scores), "cdf": list(self.cdf)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Levels:
        """Read what `to_dict` wrote; raises DataError for anything else."""
        try:
            levels = cls(int(raw["num_levels"]), tuple(map(float, raw["scores"])), tuple(map(float, raw["cdf"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"levels: not a stored quantile table ({error!r}); rerun the distill stage") from error
        knots = np.asarray(levels.scores)
        rising = knots.size > 0 and bool(np.isfinite(knots).all() and (np.diff(knots) > 0).all())
        if not rising or len(levels.cdf) != knots.size:
            raise DataError("levels: the quantile table needs rising scores with one cdf each; rerun the distill stage")
        return levels


class Distilled(NamedTuple):
    """What distillation made of a pool."""

    examples: pa.Table  # schema.examples, by example_id
    dropped: pa.Table  # schema.DROPPED, by response_id; each pool row is in exactly one of the two
    levels: dict[str, Levels]  # by attribute; fitted on the pool's usable answers
    cells_before: dict[str, int]  # "3,1" -> usable answers that were labelled so
    cells_after: dict[str, int]  # "3,1" -> examples
    warnings: list[str]


def prompt_quantiles(scores: ArrayLike, prompt_ids: Sequence[str]) -> Floats:
    """Mid-rank quantile (rank - 0.5) / n among the n answers to the same prompt, ties sharing their mean rank.

    NaN for a prompt's only answer: a rank among one says nothing, so distillation drops it as "single_answer".
    """
    values = _finite(scores)
    groups = _groups(prompt_ids)
    quantiles = np.full(values.shape, np.nan)
    for rows in groups.values():
        if len(rows) > 1:
            quantiles[rows] = (stats.rankdata(values[rows]) - 0.5) / len(rows)
    return quantiles


def distill(
    pool: pa.Table, control: config.Control, settings: config.Distill, seed: int, special_ids: Set[int] = frozenset()
) -> Distilled:
    """Make training examples of a scored pool.

    `pool` has response_id, prompt_id, messages, text, token_ids, finish_reason and a `score_<attribute>` for each one.
    Reasons for dropped rows: truncated, empty, special_tokens (a token of `special_ids` was sampled before the answer's end: it
    would stand in a training row as if a template had placed it), duplicate (same prompt and text), single_answer (labels by
    prompt), inner_quantile (extremes), cell_full (balance), over_budget (max_examples). Raises DataError when nothing is left.
    """
    names = [a.name for a in control.attributes]
    pool = _ordered(pool, names)
    reasons = _unusable(pool, settings.keep_truncated, special_ids)
    usable = _remaining(reasons)
    scores_NA = _scores(pool, names, usable)
    levels = {a.name: Levels.fit(scores_NA[usable, i], a.levels) for i, a in enumerate(control.attributes)}
    quantiles_NA = _quantiles(scores_NA, usable, pool["prompt_id"].to_pylist(), levels, settings.labels)
    _drop(reasons, [i for i in usable if np.isnan(quantiles_NA[i]).any()], "single_answer")
    labelled = _remaining(reasons)
    cells_N = _cells(quantiles_NA, control)
    _select(reasons, quantiles_NA, cells_N, pool["response_id"].to_pylist(), settings, seed)
    kept = _remaining(reasons)
    examples, warnings = _examples(pool.take(pa.array(kept)), [cells_N[i] for i in kept], control, settings, seed)
    after = _histogram([cells_N[i] for i in kept])
    return Distilled(
        examples=examples,
        dropped=_dropped(pool["response_id"].to_pylist(), reasons),
        levels=levels,
        cells_before=_histogram([cells_N[i] for i in labelled]),
        cells_after=after,
        warnings=_pool_warnings(levels, after, names) + warnings,
    )


def usable(pool: pa.Table, keep_truncated: bool, special_ids: Set[int]) -> list[int]:
    """Rows of a pool, sorted by response_id, that scales are fitted on: those that `distill` does not drop for what they are."""
    return [i for i, reason in enumerate(_unusable(pool, keep_truncated, special_ids)) if not reason]


def water_fill(counts: Sequence[int], budget: int) -> list[int]:
    """How many each cell keeps: min(count, t), t the highest water line that fits the budget; the largest lose first.

    What is left below one more line goes to the first cells that still have rows: [5, 1, 5] with 8 gives [4, 1, 3].
    """
    line, left = 0, budget
    while left and (open_cells := [i for i, n in enumerate(counts) if n > line]):
        if left < len(open_cells):
            extra = set(open_cells[:left])
            return [min(n, line) + (i in extra) for i, n in enumerate(counts)]
        step = min(min(counts[i] for i in open_cells) - line, left // len(open_cells))
        line, left = line + step, left - step * len(open_cells)
    return [min(n, line) for n in counts]


def draw(num_items: int, excluded: int, count: int, *key: Any) -> list[int]:
    """`count` different items of range(num_items), all but the excluded one equally likely, told by the key."""
    taken, drawn = [excluded], []
    for turn in range(min(count, num_items - 1)):
        item = int(schema.digest(*key, turn), 16) % (num_items - len(taken))
        for other in taken:  # rising, so that each step skips one taken item
            item += item >= other
        bisect.insort(taken, item)
        drawn.append(item)
    return drawn


def _finite(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(f"levels: {bad} of {values.size} scores are not finite; quarantine them in the score stage")
    return values


def _bins(quantiles: Floats, num_levels: int) -> Ints:
    known = np.where(np.isnan(quantiles), 0.5, quantiles)
    levels = np.clip(np.ceil(num_levels * known - SLACK), 1, num_levels)
    return np.where(np.isnan(quantiles), 0, levels).astype(np.int64)


def _groups(keys: Sequence[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    return groups


def _ordered(pool: pa.Table, names: Sequence[str]) -> pa.Table:
    needed = [*POOL_COLUMNS, *(f"score_{a}" for a in names)]
    schema.require_columns(pool.column_names, *needed, stage="distill")
    if not pool.num_rows:
        raise DataError("distill: the pool is empty; rerun generate and score, and look at their quarantine tables")
    for column in ("response_id", "prompt_id"):
        if pool[column].null_count:
            raise DataError(f"distill: {pool[column].null_count} rows have no {column}; rerun the generate stage")
    most = Counter(pool["response_id"].to_pylist()).most_common(1)[0]
    if most[1] > 1:
        raise DataError(f"distill: response_id {most[0]!r} appears {most[1]} times; rerun the score stage")
    return pool.select(needed).sort_by("response_id")


def _unusable(pool: pa.Table, keep_truncated: bool, special_ids: Set[int] = frozenset()) -> list[str]:
    """Per row why it cannot be learned from, or an empty string; of equal answers the first by response_id stays."""
    seen: set[tuple[str, str]] = set()
    reasons = []
    columns = (pool[c].to_pylist() for c in ("prompt_id", "text", "token_ids", "finish_reason"))
    for prompt, text, tokens, finish in zip(*columns, strict=True):
        key = (prompt, (text or "").strip())
        if finish not in schema.FINISHED and not keep_truncated:
            reasons.append("truncated")
        elif not key[1] or not tokens:
            reasons.append("empty")
        elif not special_ids.isdisjoint(tokens[:-1] if finish in schema.FINISHED else tokens):  # the last one ends the turn
            reasons.append(schema.SPECIAL_TOKENS)
        elif key in seen:
            reasons.append("duplicate")
        else:
            seen.add(key)
            reasons.append("")
    return reasons


def _remaining(reasons: Sequence[str]) -> list[int]:
    rows = [i for i, reason in enumerate(reasons) if not reason]
    if not rows:
        counts = Counter(reasons)
        shown = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
        worst = max(HINTS, key=lambda reason: counts[reason])
        raise DataError(f"distill: none of {len(reasons)} answers is left ({shown}); {HINTS[worst]}")
    return rows


def _drop(reasons: list[str], rows: Sequence[int], reason: str) -> None:
    for row in rows:
        reasons[row] = reason


def _scores(pool: pa.Table, names: Sequence[str], usable: Sequence[int]) -> Floats:
    """Scores of all rows; only usable rows must have finite ones."""
    columns = [pool[f"score_{a}"].to_numpy(zero_copy_only=False).astype(np.float64) for a in names]
    for name, column in zip(names, columns, strict=True):
        bad = [i for i in usable if not math.isfinite(column[i])]
        if bad:
            first = pool["response_id"][bad[0]].as_py()
            raise DataError(
                f"distill: score_{name} is not finite in {len(bad)} usable rows, first {first!r}; "
                "the score stage should have quarantined them: rerun it"
            )
    return np.column_stack(columns)


def _quantiles(
    scores_NA: Floats, usable: Sequence[int], prompts: Sequence[str], levels: Mapping[str, Levels], labels: str
) -> Floats:
    """What labels and extremes both go by: F(score) in the pool, or the rank quantile within the prompt."""
    quantiles_NA = np.full(scores_NA.shape, np.nan)
    usable_prompts = [prompts[i] for i in usable]
    for a, fitted in enumerate(levels.values()):
        column = scores_NA[usable, a]
        by_prompt = labels == "prompt"
        quantiles_NA[usable, a] = prompt_quantiles(column, usable_prompts) if by_prompt else fitted.quantile(column)
    return quantiles_NA


def _cells(quantiles_NA: Floats, control: config.Control) -> list[Cell]:
    columns = [_bins(quantiles_NA[:, i], a.levels).tolist() for i, a in enumerate(control.attributes)]
    return list(zip(*columns, strict=True))


def _select(
    reasons: list[str],
    quantiles_NA: Floats,
    cells_N: Sequence[Cell],
    ids: Sequence[str],
    settings: config.Distill,
    seed: int,
) -> None:
    """Apply the strategy: mark rows as inner_quantile, then as cell_full or over_budget."""
    if settings.strategy in ("extremes", "moec"):
        is_outer_N = np.any((quantiles_NA < settings.outer) | (quantiles_NA > 1 - settings.outer), axis=1).tolist()
        _drop(reasons, [i for i in _remaining(reasons) if not is_outer_N[i]], "inner_quantile")
    rows = sorted(_remaining(reasons), key=lambda i: schema.digest(seed, ids[i]))
    if settings.strategy in ("balance", "moec"):
        _drop(reasons, _over_quota(rows, cells_N, settings.max_examples, seed), "cell_full")
    else:
        _drop(reasons, rows[settings.max_examples :], "over_budget")


def _over_quota(rows: Sequence[int], cells_N: Sequence[Cell], max_examples: int, seed: int) -> list[int]:
    """Rows that balancing leaves out, given the rows in order of preference.

    The budget fills the cells to one water line. The line also stops at the median cell: a pool smaller than the budget
    would otherwise pass through unbalanced, and going down to the smallest cell would let a rare cell cost all others.
    """
    members = {cell: [rows[i] for i in at] for cell, at in _groups([cells_N[i] for i in rows]).items()}
    order = sorted(members, key=lambda cell: schema.digest(seed, "cell", cell))
    ceiling = max(1, int(np.median([len(m) for m in members.values()])))
    quotas = water_fill([min(len(members[cell]), ceiling) for cell in order], max_examples)
    return [row for cell, quota in zip(order, quotas, strict=True) for row in members[cell][quota:]]


def _examples(
    kept: pa.Table, cells: Sequence[Cell], control: config.Control, settings: config.Distill, seed: int
) -> tuple[pa.Table, list[str]]:
    prompts = kept["prompt_id"].to_pylist()
    split, warnings = _split(prompts, settings.valid_fraction, seed)
    if settings.counterfactual == "code":
        wrong, notes = _wrong_codes(kept, cells, [a.levels for a in control.attributes], settings.counterfactuals, seed)
    else:
        wrong, notes = _wrong_responses(kept, cells, settings.counterfactuals, seed)
    balanced = settings.strategy in ("balance", "moec")
    columns: dict[str, Any] = {
        "example_id": kept["response_id"],
        "prompt_id": kept["prompt_id"],
        "split": split,
        "messages": kept["messages"],
        "response": kept["text"],
        "token_ids": kept["token_ids"],
        **{f"level_{a.name}": [cell[i] for cell in cells] for i, a in enumerate(control.attributes)},
        "counterfactuals": wrong,
        "weight": _weights(cells) if balanced else [1.0] * len(cells),
    }
    table_schema = schema.examples([a.name for a in control.attributes])
    arrays = [_column(columns[field.name], field.type) for field in table_schema]
    return pa.Table.from_arrays(arrays, schema=table_schema), warnings + notes


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if not isinstance(values, pa.ChunkedArray):
        return pa.array(values, kind)
    merged = values.combine_chunks()
    return merged if merged.type == kind else merged.cast(kind)


def _weights(cells: Sequence[Cell]) -> list[float]:
    """Weights by which all cells count the same in the loss; their mean is 1.

    A row of a cell with n rows weighs (largest cell) / n, but at most twice a row of the largest cell: heavier rows
    would be learned by heart.
    """
    counts = Counter(cells)
    most = max(counts.values())
    raw = np.array([min(MAX_WEIGHT, most / counts[cell]) for cell in cells])
    return (raw / raw.mean()).tolist()  # type: ignore[no-any-return]


def _split(prompts: Sequence[str], valid_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Whole prompts go to valid: the rounded share of them, at least one on either side when there are two."""
    order = sorted(set(prompts), key=lambda p: schema.digest(seed, "valid", p))
    if len(order) < 2:
        return ["train"] * len(prompts), ["all examples are of one prompt, so none is held out; use more prompts"]
    size = min(max(math.floor(valid_fraction * len(order) + 0.5), 1), len(order) - 1)
    valid = set(order[:size])
    return ["valid" if p in valid else "train" for p in prompts], []


def _wrong_codes(
    kept: pa.Table, cells: Sequence[Cell], sizes: Sequence[int], count: int, seed: int
) -> tuple[list[Any], list[str]]:
    """Other cells of the full grid (not only those that the pool reached) for the same answer."""
    num_cells = math.prod(sizes)
    wrong = []
    for row, tokens, cell in zip(kept["response_id"].to_pylist(), kept["token_ids"].to_pylist(), cells, strict=True):
        own = int(np.ravel_multi_index([level - 1 for level in cell], sizes))
        others = draw(num_cells, own, count, seed, "code", row)
        codes = [[int(i) + 1 for i in np.unravel_index(other, sizes)] for other in others]
        wrong.append([{"levels": code, "token_ids": tokens} for code in codes])
    few = num_cells - 1 < count
    return wrong, [f"distill.counterfactuals={count}, but a code has only {num_cells - 1} others"] if few else []


def _wrong_responses(kept: pa.Table, cells: Sequence[Cell], count: int, seed: int) -> tuple[list[Any], list[str]]:
    """Other examples of the same prompt whose cell differs, under the example's own levels."""
    ids, tokens = kept["response_id"].to_pylist(), kept["token_ids"].to_pylist()
    siblings = _groups(kept["prompt_id"].to_pylist())
    wrong: list[Any] = [None] * len(ids)
    for rows in siblings.values():
        for i in rows:
            others = [j for j in rows if cells[j] != cells[i] and tokens[j] != tokens[i]]
            others.sort(key=lambda j: schema.digest(seed, "response", ids[i], ids[j]))
            wrong[i] = [{"levels": list(cells[i]), "token_ids": tokens[j]} for j in others[:count]]
    lacking = sum(not w for w in wrong)
    note = f"{lacking} of {len(ids)} examples have no wrong pair: their prompt has no answer of another cell"
    return wrong, [note] if lacking else []


def _histogram(cells: Sequence[Cell]) -> dict[str, int]:
    return {",".join(map(str, cell)): n for cell, n in sorted(Counter(cells).items())}


def _dropped(ids: Sequence[str], reasons: Sequence[str]) -> pa.Table:
    rows = [{"response_id": i, "reason": r} for i, r in zip(ids, reasons, strict=True) if r]
    return pa.Table.from_pylist(rows, schema=schema.DROPPED)


_WIDER = "add behaviours (generate.behaviours) or choose another score"
"""What makes answers differ in a score."""


def _pool_warnings(levels: Mapping[str, Levels], after: Mapping[str, int], names: Sequence[str]) -> list[str]:
    warnings = [
        f"score_{name} is {fitted.scores[0]:g} for every usable answer, so its dial has nothing to learn from; {_WIDER}"
        for name, fitted in levels.items()
        if len(fitted.scores) == 1
    ]
    if len(after) == 1:
        (cell, count), *_ = after.items()
        where = f"{', '.join(names)} = {cell}"
        warnings.append(f"all {count} examples lie in one cell ({where}), so no dial can be learned; {_WIDER}")
    return warnings
