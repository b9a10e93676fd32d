"""The evaluation grid as arrays: one `Rows` per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ctrlray import config, schema
from ctrlray.errors import DataError
from ctrlray.metrics.bootstrap import Floats, Ints, Sums, draws, numbers

BASELINES = ("start", "prompting")
MODEL = "model"
"""Column of a grid that holds several models of one method, such as those of several training seeds: which one answered."""
_BETWEEN = "\0"


@dataclass(frozen=True)
class Rows:
    """One method's rows of the grid that have a score for every attribute, and counts of all its rows."""

    prompts: tuple[str, ...]
    """Prompt ids in the order of their numbers; of several models an id stands once for each, whose answers never mix."""
    prompt_N: Ints
    requested_NA: Floats
    units_NA: Floats
    num_tokens_N: Floats
    texts: tuple[str, ...]
    num_all: int
    mean_tokens: float
    """Over all rows, also those without a score."""
    finished: float
    """Share of all rows whose answer was not cut off."""
    distinct_outputs: float
    """Share of prompts whose settings do not all give the same text, of all rows; see `distinct_outputs`."""

    @property
    def num_prompts(self) -> int:
        """Prompts that have a row with scores, times the models that answered them: P."""
        return len(self.prompts)

    @property
    def num_distinct(self) -> int:
        """Prompts that have a row with scores."""
        return len(set(self.prompts))

    def draws(self, num_bootstrap: int, seed: int) -> Floats:
        """weights_BP; a draw takes a prompt with the answers of all models or not at all."""
        distinct, where_P = np.unique(np.asarray(self.prompts), return_inverse=True)
        return draws(len(distinct), num_bootstrap, seed)[:, where_P]

    def by_prompt(self, sums: Sums, prompts: Sequence[str]) -> Sums:
        """Sums over the models of each given prompt id."""
        where = {p: i for i, p in enumerate(prompts)}
        kept = [i for i, p in enumerate(self.prompts) if p in where]
        number = np.array([where[self.prompts[i]] for i in kept], np.int64)
        top, bottom = (np.bincount(number, part[kept], minlength=len(prompts)) for part in sums)
        return Sums(np.asarray(top, np.float64), np.asarray(bottom, np.float64))

    def numbers_of(self, prompts: Sequence[str]) -> Ints:
        """The number here of each given prompt id; KeyError for one that has no row."""
        where = {p: i for i, p in enumerate(self.prompts)}
        return np.array([where[p] for p in prompts], np.int64)


def rows_of(grid: pa.Table, control: config.Control) -> dict[str, Rows]:
    """The grid by method, the starting model and prompting first, then by name; the order of its rows does not matter."""
    names = [a.name for a in control.attributes]
    per = [f"{kind}_{a}" for a in names for kind in ("requested", "units")]
    needed = ["prompt_id", "method", "sample", "text", "num_tokens", "finish_reason", *per]
    needed += [MODEL] if MODEL in grid.column_names else []
    schema.require_columns(grid.column_names, *needed, stage="evaluate")
    if not grid.num_rows:
        raise DataError("evaluate: the grid is empty; rerun the evaluate stage")
    keys = ["method", "prompt_id", *(f"requested_{a}" for a in names), "sample", "text"]
    ordered = grid.select(needed).sort_by([(k, "ascending") for k in keys])
    methods = ordered["method"].to_pylist()
    known = sorted(set(methods), key=lambda m: (m != BASELINES[0], m != BASELINES[1], m))
    return {m: _rows(ordered.filter(pa.array([found == m for found in methods])), names, m) for m in known}


def _rows(table: pa.Table, names: Sequence[str], method: str) -> Rows:
    for column in ("prompt_id", "num_tokens", *(f"requested_{a}" for a in names)):
        if table[column].null_count:
            raise DataError(f"evaluate: {table[column].null_count} rows of {method!r} have no {column}; rerun evaluate")
    units_NA = np.column_stack([_floats(table[f"units_{a}"]) for a in names])
    keep: NDArray[np.bool_] = np.asarray(np.isfinite(units_NA).all(axis=1))
    if not keep.any():
        raise DataError(f"evaluate: none of {len(keep)} rows of {method!r} has a score; look at the quarantine table")
    scored = table.filter(pa.array(keep))
    answered = _answered(scored)
    prompt_N, _ = numbers(answered, len(answered), "evaluate")
    requested_NA = np.column_stack([_floats(scored[f"requested_{a}"]) for a in names])
    finish = table["finish_reason"].to_pylist()
    return Rows(
        prompts=tuple(a.split(_BETWEEN)[0] for a in sorted(set(answered))),
        prompt_N=prompt_N,
        requested_NA=requested_NA,
        units_NA=units_NA[keep],
        num_tokens_N=_floats(scored["num_tokens"]),
        texts=tuple(t or "" for t in scored["text"].to_pylist()),
        num_all=table.num_rows,
        mean_tokens=float(table["num_tokens"].to_numpy().mean()),
        finished=sum(f in schema.FINISHED for f in finish) / len(finish),
        distinct_outputs=distinct_outputs(table, names),
    )


def _answered(table: pa.Table) -> list[str]:
    """By row, the prompt and the model that answered it."""
    prompts: list[str] = table["prompt_id"].to_pylist()
    if MODEL not in table.column_names:
        return prompts
    return [f"{p}{_BETWEEN}{m}" for p, m in zip(prompts, table[MODEL].to_pylist(), strict=True)]


def distinct_outputs(table: pa.Table, names: Sequence[str]) -> float:
    """Share of prompts whose settings do not all give the same text (of several samples, the same texts in any order).

    Tells of a dial that does nothing only under greedy sampling: sampled texts differ by chance.
    """
    texts: dict[str, dict[tuple[int, ...], list[str]]] = {}
    requested = [table[f"requested_{a}"].to_pylist() for a in names]
    rows = zip(_answered(table), table["text"].to_pylist(), *requested, strict=True)
    for prompt, text, *setting in rows:
        texts.setdefault(prompt, {}).setdefault(tuple(setting), []).append(text)
    changed = [len({tuple(sorted(t)) for t in by_setting.values()}) > 1 for by_setting in texts.values()]
    return sum(changed) / len(changed)


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), np.float64)
