"""Requests: which answers are to be sampled of which prompts, and how each is rendered, a part of the prompts at a time.

    prompts, one part    ─► rendered by the driver ──────────────────────────────► files of requests
    prompts, many parts  ─► ranges of requests: numbers only ─► [ExpandRange actors] ─► files of requests

Request i of a part is sample i % samples of its prompt i // samples, so a range of numbers says which answers are meant. The
driver of a large run holds eight bytes per request and no text.
"""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ctrlray import config, schema
from ctrlray.control import Renderer, with_system
from ctrlray.errors import DataError
from ctrlray.schema import Message
from ctrlray.tables import Storage, from_rows, slices
from ctrlray.telemetry import Where, record_if_restarted, warn_quarantined

TABLE = "requests"
Keys = NDArray[np.int64]
_PARTS_KEPT = 2
_AT_ONCE = 2**16


class PromptParts(Mapping[str, list[Message]]):
    """The prompts of one split where they are stored, a part at a time; as a mapping, conversations by prompt_id. Picklable.

    Parts are named by their first prompt_id, and their rows are in its order.
    """

    def __init__(self, storage: Storage, split: str) -> None:
        self._storage, self._split = storage, split
        self._kept: dict[str, dict[str, list[Message]]] = {}

    def __reduce__(self) -> tuple[type, tuple[Storage, str]]:
        return PromptParts, self.place

    @property
    def place(self) -> tuple[Storage, str]:
        """What makes the same again, for actors: of their arguments Ray Data copies every mapping whole, to export its plan."""
        return self._storage, self._split

    @cached_property
    def names(self) -> list[str]:
        """The parts, in order."""
        return [n.removesuffix(".parquet") for n in self._storage.names("prompts", suffix=".parquet")]

    def table(self) -> pa.Table:
        """All prompts of the split."""
        return self._mine(self._storage.read_table("prompts", schema.PROMPTS))

    def part(self, name: str) -> pa.Table:
        """The split's prompts in one part."""
        return self._mine(self._storage.read_part("prompts", name, schema.PROMPTS))

    def ids(self, name: str) -> list[str]:
        """Their ids alone."""
        columns = self._storage.read_part("prompts", name, schema.PROMPTS, ["prompt_id", "split"])
        return list(self._mine(columns)["prompt_id"].to_pylist())

    def _mine(self, prompts: pa.Table) -> pa.Table:
        return prompts.filter(pc.equal(prompts["split"], self._split))

    def __getitem__(self, prompt_id: str) -> list[Message]:
        name = self.names[max(bisect.bisect(self.names, schema.part_of(prompt_id)) - 1, 0)]
        if name not in self._kept:
            if len(self._kept) == _PARTS_KEPT:
                self._kept.pop(next(iter(self._kept)))  # the one that was read first: blocks come about in order
            self._kept[name] = {p["prompt_id"]: p["messages"] for p in self.part(name).to_pylist()}
        return self._kept[name][prompt_id]

    def __iter__(self) -> Iterator[str]:
        return (i for name in self.names for i in self.ids(name))

    def __len__(self) -> int:
        return sum(len(self.ids(name)) for name in self.names)


class ExpandRange:
    """Ray Data actor: a range of a part's requests in, a file of them, rendered, out."""

    def __init__(
        self,
        place: tuple[Storage, str],
        settings: config.Generate,
        renderer: Renderer,
        fingerprint: str,
        max_prompt: int,
        out: Storage,
        where: Where,
    ) -> None:
        record_if_restarted(where, "request writer")
        self._where = where
        self._prompts, self._settings, self._renderer = PromptParts(*place), settings, renderer
        self._fingerprint, self._max_prompt, self._out = fingerprint, max_prompt, out
        self._part: tuple[str, pa.Table] = ("", schema.PROMPTS.empty_table())

    def __call__(self, ranges: pa.Table) -> pa.Table:
        """Write the requests of each range, and the quarantine rows of those that cannot be asked."""
        return pa.table({"path": pa.array([self._expand(r) for r in ranges.to_pylist()], pa.string())})

    def _expand(self, asked: Mapping[str, Any]) -> str:
        if self._part[0] != asked["part"]:
            self._part = (asked["part"], self._prompts.part(asked["part"]))
        samples, begin, end = self._settings.samples, asked["first"], asked["first"] + asked["rows"]
        first = begin // samples
        prompts = self._part[1].slice(first, -(-end // samples) - first)
        done = set(asked["done"])
        numbers = {i - first * samples for i in range(begin, end) if i not in done}
        made, refused = expand_requests(
            prompts, self._settings, self._renderer, self._fingerprint, self._max_prompt, numbers
        )
        if refused.num_rows:
            self._out.write_table(refused, "quarantine", f"part-{schema.digest(refused['row_id'].to_pylist())}")
            warn_quarantined(self._where, refused.to_pylist())
        part = f"part-{schema.digest(made['response_id'].to_pylist())}"
        self._out.write_table(made, TABLE, part)
        return self._out.path(TABLE, f"{part}.parquet")


def expand_requests(
    prompts: pa.Table,
    settings: config.Generate,
    renderer: Renderer,
    fingerprint: str,
    max_prompt: int,
    numbers: Container[int] | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Every answer to be sampled, and the quarantine rows of prompts that cannot be rendered or do not fit in the context.

    Requests are ordered by prompt, so that the samples of one prompt meet in one batch and share its cached prefix.
    `numbers`: only those, counted in this order from 0.
    """
    requests, refused = [], []
    prefixes = {b.name: renderer.text_ids(b.prefix) for b in settings.behaviours}
    limits = {b.name: b.max_tokens or settings.sampling.max_tokens for b in settings.behaviours}
    samples = dealt(settings)
    for i, prompt in enumerate(prompts.to_pylist()):
        rendered, unsafe = _rendered(prompt["messages"], settings, renderer)
        for number, (behaviour, sample) in enumerate(samples, i * len(samples)):
            if numbers is not None and number not in numbers:
                continue
            key = schema.response_id(prompt["prompt_id"], behaviour, sample, fingerprint)
            if unsafe:
                detail = f"prompt {prompt['prompt_id']}: {unsafe}"
                refused.append({"stage": "generate", "row_id": key, "error": schema.SPECIAL_TOKENS, "detail": detail})
                continue
            ids, prefix = rendered[behaviour], prefixes[behaviour]
            if len(ids) + len(prefix) > max_prompt:
                detail = f"prompt {prompt['prompt_id']} has {len(ids)} tokens, the context leaves room for {max_prompt}"
                refused.append({"stage": "generate", "row_id": key, "error": "prompt_too_long", "detail": detail})
                continue
            requests.append(
                {
                    "response_id": key,
                    "prompt_id": prompt["prompt_id"],
                    "behaviour": behaviour,
                    "sample": sample,
                    "prompt_token_ids": ids,
                    "prefix_token_ids": prefix,
                    "max_tokens": limits[behaviour],
                }
            )
    return from_rows(requests, schema.REQUESTS), from_rows(refused, schema.QUARANTINE)


def _rendered(
    messages: Sequence[Message], settings: config.Generate, renderer: Renderer
) -> tuple[dict[str, list[int]], str]:
    """The prompt under each behaviour, and why it cannot be asked, empty where it can."""
    try:
        if all(b.system is not None for b in settings.behaviours):  # they hide the prompt's own, with which it is trained on
            renderer.render(messages)
        return {b.name: renderer.render(with_system(messages, b.system)) for b in settings.behaviours}, ""
    except DataError as error:
        return {}, str(error)


def dealt(settings: config.Generate) -> list[tuple[str, int]]:
    """Behaviour and number of each sample of one prompt: dealt over the behaviours in order.

    With 6 samples and 4 behaviours the first two are used twice.
    """
    names = [b.name for b in settings.behaviours]
    return [(names[i % len(names)], i // len(names)) for i in range(settings.samples)]


def request_ids(prompt_ids: Iterable[str], settings: config.Generate, fingerprint: str) -> list[str]:
    """The ids of the answers to be sampled, in the order of their numbers."""
    samples = dealt(settings)
    return [schema.response_id(p, behaviour, sample, fingerprint) for p in prompt_ids for behaviour, sample in samples]


def ranges(
    prompts: PromptParts, settings: config.Generate, fingerprint: str, done: Keys
) -> tuple[list[dict[str, Any]], int]:
    """One range for each batch with something to be sampled, and how many requests there are in all.

    `done` in a range are the numbers of what is not to be sampled.
    """
    found, asked = [], 0
    for part in prompts.names:
        ids = prompts.ids(part)
        over = among(keys(request_ids(ids, settings, fingerprint)), done) if done.size else None
        total = len(ids) * settings.samples
        asked += total
        for first in range(0, total, settings.batch_size):
            rows = min(settings.batch_size, total - first)
            left_out = [] if over is None else (first + np.flatnonzero(over[first : first + rows])).tolist()
            if len(left_out) < rows:
                found.append({"part": part, "first": first, "rows": rows, "done": left_out})
    return found, asked


def all_keys(prompts: PromptParts, settings: config.Generate, fingerprint: str) -> Keys:
    """Of every request."""
    parts = (keys(request_ids(prompts.ids(n), settings, fingerprint)) for n in prompts.names)
    return np.concatenate(list(parts))


def write_blocks(pending: pa.Table, out: Storage, rows: int) -> list[str]:
    """Write pending requests as one file per batch: each file becomes one block, so that work streams."""
    name = f"{TABLE}-{schema.digest(pending['response_id'].to_pylist())}"
    for i, block in enumerate(slices(pending, rows)):
        out.write_table(block, name, f"part-{i:06d}")
    return [out.path(name, f) for f in out.names(name, suffix=".parquet")]


def keys(ids: Sequence[str]) -> Keys:
    """64 bits of each id, as many as ids are made of; they mean something in this process only."""
    return np.fromiter(map(hash, ids), np.int64, len(ids))


def among(some: Keys, known: Keys) -> NDArray[np.bool_]:
    """Which of `some` are in `known`, which is sorted."""
    if not known.size:
        return np.zeros(some.size, np.bool_)
    return np.asarray(known[np.minimum(np.searchsorted(known, some), known.size - 1)] == some)


def num_among(some: Keys, known: Keys) -> int:
    """How many of `some` are in `known`, which is sorted; without an array of all places beside them."""
    return sum(int(among(some[i : i + _AT_ONCE], known).sum()) for i in range(0, some.size, _AT_ONCE))


def joined(parts: Iterable[Keys]) -> Keys:
    """All of them, sorted."""
    found: Keys = np.concatenate([keys([]), *parts])
    found.sort()
    return found
