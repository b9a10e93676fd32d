r"""Human labels from files: preference pairs and ratings of single answers, in the formats that people publish them in.

    hh       {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}        Anthropic HH's native dialogues
    pairs    {"prompt": ..., "chosen": ..., "rejected": ..., "margin": 0.5}         margin only where there is one
    ratings  {"prompt": ..., "response": ..., "helpfulness": 4, "verbosity": 2}     a number per attribute

A prompt is a text or a list of messages; chosen and rejected are texts, or lists of messages that end with the answer (such
a list may begin with the prompt, which then need not be given). Files are jsonl, jsonl.gz or parquet.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ctrlray.errors import DataError
from ctrlray.hh import Pair, judge_half, parse_pair
from ctrlray.rewards.job import RewardTrainJob
from ctrlray.schema import ROLES, Message, first_human_turn

Format = Literal["hh", "pairs", "ratings"]
KEPT = {False: "kept for the judge", True: "kept for the reward"}
"""Why a training row of the other half is left out, by whether a judge is made."""


@dataclass(frozen=True)
class Rated:
    """One answer with its ratings by attribute."""

    messages: tuple[Message, ...]
    response: str
    ratings: Mapping[str, float]


@dataclass(frozen=True)
class Labels:
    """The usable rows of one file, in its order, and how many others there were by reason."""

    format: Format
    pairs: tuple[Pair, ...] = ()
    rated: tuple[Rated, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of usable rows."""
        return len(self.pairs) + len(self.rated)


class _BadRowError(Exception):
    """Why a row cannot be used."""


def read_labels(path: str | Path, attributes: Sequence[str] = ()) -> Labels:
    """Labels of a file whose format is told by its first record.

    `attributes`: the ratings that are wanted; every number beside prompt and response when empty. `$CTRLRAY_DATA` and other
    variables in the path are expanded. Raises DataError when the file is not there, is damaged, or is of no known format.
    """
    file = _file(path)
    rows = _records(file)
    kind: Format | None = None
    pairs: list[Pair] = []
    rated: list[Rated] = []
    dropped: Counter[str] = Counter()
    seen: list[str] = []
    for row in rows:
        if not isinstance(row, dict):
            dropped["unparsable"] += 1
            continue
        kind = kind or _format(row)
        seen = seen or sorted(map(str, row))
        try:
            if kind is None:
                raise _BadRowError("unparsable")
            if kind == "ratings":
                rated.append(_rated(row, attributes))
            else:
                pairs.append(_hh(row) if kind == "hh" else _pair(row))
        except _BadRowError as error:
            dropped[str(error)] += 1
    if kind is None:
        found = f"its first record has {seen}" if seen else "it holds no JSON record"
        raise DataError(
            f"{file}: no known format, {found}; give HH dialogues (chosen, rejected), pairs (prompt, chosen, rejected) or "
            "ratings (prompt, response and a number per attribute)"
        )
    return Labels(kind, tuple(pairs), tuple(rated), dict(sorted(dropped.items())))


def read_parts(job: RewardTrainJob) -> dict[str, Labels]:
    """The labels of every `train/<attribute>` and `valid/<attribute>` of a job, training rows of the halves that it may see.

    Raises DataError where fewer than two rows are left.
    """
    parts = {}
    for a in job.attributes:
        for split, path in (("train", a.train), ("valid", a.valid)):
            found = read_labels(path, [a.name])
            pairs, rated, dropped = list(found.pairs), list(found.rated), dict(found.dropped)
            if split == "train" and (job.judge or job.reserve_judge_half):
                pairs = [p for p in pairs if judge_half(first_human_turn(p.messages)) == job.judge]
                rated = [r for r in rated if judge_half(first_human_turn(r.messages)) == job.judge]
                dropped[KEPT[job.judge]] = len(found) - len(pairs) - len(rated)
            labels = Labels(found.format, tuple(pairs[: job.max_pairs]), tuple(rated[: job.max_pairs]), dropped)
            if len(labels) < 2:
                hint = "; reserve_judge_half=false would use the judge's" if dropped.get(KEPT[False]) else ""
                raise DataError(
                    f"attributes.{a.name}.{split}={path!r}: {len(labels)} usable rows, at least 2 are needed; not used: "
                    f"{dropped}{hint}"
                )
            parts[f"{split}/{a.name}"] = labels
    return parts


def preference_pairs(labels: Mapping[str, Labels]) -> dict[str, Sequence[Pair]]:
    """The pairs of every part. Raises DataError where a part holds ratings, which linear heads cannot learn from."""
    for part, found in labels.items():
        if found.format == "ratings":
            raise DataError(
                f"attributes.{part.partition('/')[2]}: ratings, but heads are fitted to preference pairs; give pairs, or set "
                "method.type=finetune"
            )
    return {part: found.pairs for part, found in labels.items()}


def _file(path: str | Path) -> Path:
    file = Path(os.path.expandvars(str(path))).expanduser()
    if not file.is_file():
        hint = "; set CTRLRAY_DATA to the folder that holds hh/" if "CTRLRAY_DATA" in str(path) else ""
        raise DataError(f"no file of labels at {file}{hint}")
    if not file.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise DataError(f"{file}: unknown ending; labels come as .jsonl, .jsonl.gz or .parquet")
    return file


def _records(file: Path) -> Iterator[Any]:
    """Each row's value; None for a line that is not JSON."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file ({error}); write it again") from error
        return
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    yield _json(line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: broken ({error}); fetch the file again") from error


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _format(row: Mapping[str, Any]) -> Format | None:
    asked = "prompt" in row or "messages" in row
    if "chosen" in row and "rejected" in row:
        return "pairs" if asked or isinstance(row["chosen"], list) else "hh"
    return "ratings" if "response" in row and asked else None


def _hh(row: Mapping[str, Any]) -> Pair:
    try:
        return _checked(parse_pair(row["chosen"], row["rejected"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _BadRowError("unparsable") from None


def _pair(row: Mapping[str, Any]) -> Pair:
    if "chosen" not in row or "rejected" not in row:
        raise _BadRowError("unparsable")
    (before, chosen), (other, rejected) = _answer(row["chosen"]), _answer(row["rejected"])
    if (given := _given(row)) is not None:
        messages = _conversation(given)
    elif before == other:
        messages = _conversation(before)
    else:
        raise _BadRowError("prompts differ")
    margin = row.get("margin")
    if margin is not None and not _is_number(margin):
        raise _BadRowError("margin is not a number")
    return _checked(Pair(messages, chosen, rejected, None if margin is None else float(margin)))


def _rated(row: Mapping[str, Any], attributes: Sequence[str]) -> Rated:
    if (given := _given(row)) is None:
        raise _BadRowError("unparsable")
    messages, (_, response) = _conversation(given), _answer(row.get("response"))
    if not response:
        raise _BadRowError("empty answer")
    _encodable(messages, response)
    wanted = attributes or [k for k, v in row.items() if _is_number(v)]
    found = {k: row[k] for k in wanted if row.get(k) is not None}
    if not all(map(_is_number, found.values())):
        raise _BadRowError("rating is not a number")
    if not found:
        raise _BadRowError("no rating")
    return Rated(messages, response, {k: float(v) for k, v in found.items()})


def _checked(pair: Pair) -> Pair:
    if not pair.chosen or not pair.rejected:
        raise _BadRowError("empty answer")
    if pair.chosen == pair.rejected:
        raise _BadRowError("equal answers")
    _encodable(pair.messages, pair.chosen, pair.rejected)
    return pair


def _given(row: Mapping[str, Any]) -> Any:
    return row["prompt"] if row.get("prompt") is not None else row.get("messages")


def _answer(value: Any) -> tuple[list[Any], str]:
    """What comes before the answer where the value holds that, and the answer."""
    if isinstance(value, str):
        return [], value.strip()
    if isinstance(value, list) and value:
        last = value[-1]
        if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
            return value[:-1], last["content"].strip()
    raise _BadRowError("unparsable")


def _conversation(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise _BadRowError("unparsable")
    messages = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise _BadRowError("unparsable")
        messages.append(Message(role=role, content=content))
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise _BadRowError("empty prompt")
    return tuple(messages)


def _encodable(messages: Sequence[Message], *texts: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    try:
        for text in (*texts, *(m["content"] for m in messages)):
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRowError("broken text") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
