"""The tables between the stages: column names, types, meaning, and the hashes that identify rows.

A table's pyarrow schema carries `ctrlray.table` and `ctrlray.version` in its metadata. Per-attribute columns are
`score_<attribute>` (raw reward), `level_<attribute>` (1..levels) and so on, in the control space's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypedDict

import pyarrow as pa

from ctrlray.errors import DataError

VERSION = 1
FINISHED = ("stop", "sentence")
"""Finish reasons of complete answers: ended by the model, or cut back to their last complete sentence. Else `length`."""
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = "special_tokens"
"""Why a row is left out whose text the tokenizer reads as special tokens, or whose sampled answer holds one."""
PROMPTS_PER_PART = 4096
"""Rows of a part of the prompts table; what works on a large one reads a part at a time."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TOKENS = pa.list_(pa.int32())


def _table(name: str, fields: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata={"ctrlray.table": name, "ctrlray.version": str(VERSION)})


PROMPTS = _table(
    "prompts",
    [
        ("prompt_id", pa.string()),  # hash of the conversation
        ("messages", MESSAGES),
        ("source", pa.string()),
        ("split", pa.string()),  # train | eval; one first human turn is never in both
    ],
)

SET_PROMPTS = _table(
    "set_prompts",
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("source", pa.string()),
        ("label", pa.string()),  # safe | unsafe where the source says so, else empty
    ],
)

REQUESTS = _table(
    "requests",
    [
        ("response_id", pa.string()),  # hash(prompt_id, behaviour, sample, model fingerprint)
        ("prompt_id", pa.string()),
        ("behaviour", pa.string()),
        ("sample", pa.int32()),
        ("prompt_token_ids", TOKENS),  # rendered with the behaviour's system turn
        ("prefix_token_ids", TOKENS),  # opens the answer, and counts as its part
        ("max_tokens", pa.int32()),  # sampled at most, the prefix not among them
    ],
)

RESPONSES = _table(
    "responses",
    [
        ("response_id", pa.string()),
        ("prompt_id", pa.string()),
        ("behaviour", pa.string()),
        ("text", pa.string()),
        ("token_ids", TOKENS),  # with the end-of-turn token when finished
        ("logprob_sum", pa.float32()),  # nats of the sampled tokens, the prefix not among them, under the sampling prompt
        ("finish_reason", pa.string()),  # stop | sentence | length
        ("weights_version", pa.int32()),
        ("prompt_tokens", pa.int32()),
    ],
)

QUARANTINE = _table(
    "quarantine",
    [("stage", pa.string()), ("row_id", pa.string()), ("error", pa.string()), ("detail", pa.string())],
)

DROPPED = _table("dropped", [("response_id", pa.string()), ("reason", pa.string())])


def scores(attributes: Sequence[str]) -> pa.Schema:
    """One row per scored answer; `score_<attribute>` is the raw reward."""
    return _table("scores", [("response_id", pa.string())] + [(f"score_{a}", pa.float32()) for a in attributes])


def examples(attributes: Sequence[str]) -> pa.Schema:
    """One row per training example.

    `counterfactuals` are the wrong pairs of ExMATE: `levels` (control space order) and the answer's token ids, which
    differ from the example's own in exactly one of the two.
    """
    wrong = pa.list_(pa.struct([("levels", pa.list_(pa.int8())), ("token_ids", TOKENS)]))
    levels = [(f"level_{a}", pa.int8()) for a in attributes]
    return _table(
        "examples",
        [
            ("example_id", pa.string()),  # the response_id it was made of
            ("prompt_id", pa.string()),
            ("split", pa.string()),  # train | valid
            ("messages", MESSAGES),
            ("response", pa.string()),
            ("token_ids", TOKENS),
            *levels,
            ("counterfactuals", wrong),
            ("weight", pa.float32()),
        ],
    )


def labels() -> pa.Schema:
    """One row per preference pair or rated answer that a reward model is fine-tuned on."""
    return _table(
        "labels",
        [
            ("split", pa.string()),  # train | valid
            ("token_ids", TOKENS),  # the conversation and the chosen or the rated answer
            ("rejected_ids", TOKENS),  # the conversation and the rejected answer; empty for ratings
            ("head", pa.int16()),  # whose preference it is, an index of the attributes; -1 for ratings
            ("margin", pa.float32()),  # that chosen must keep before rejected, in log-odds
            ("ratings", pa.list_(pa.float32())),  # by attribute, in standard units, NaN where there is none; empty for pairs
        ],
    )


def rollouts(attributes: Sequence[str]) -> pa.Schema:
    """One row per answer that PPO sampled; those with an `error` are not trained on."""
    per = [(f"{kind}_{a}", t) for a in attributes for kind, t in _GRID_COLUMNS]
    return _table(
        "rollouts",
        [
            ("rollout_id", pa.string()),
            ("step", pa.int32()),
            ("prompt_id", pa.string()),
            ("group", pa.int32()),  # of one prompt and setting within the step
            ("sample", pa.int32()),
            ("plain_ids", TOKENS),  # the prompt without its code
            ("prompt_ids", TOKENS),
            ("token_ids", TOKENS),
            ("logprobs", pa.list_(pa.float32())),  # nats, by the engine, of each token of token_ids
            ("text", pa.string()),
            ("finish_reason", pa.string()),
            ("weights_version", pa.int32()),
            ("error", pa.string()),  # why it is dropped, else empty
            *per,
        ],
    )


def code_gaps() -> pa.Schema:
    """One row per held-out example: NLL in nats per token under its own code and, averaged, under every other code."""
    return _table(
        "code_gaps",
        [
            ("example_id", pa.string()),
            ("prompt_id", pa.string()),
            ("method", pa.string()),
            ("nll_right", pa.float32()),
            ("nll_wrong", pa.float32()),
        ],
    )


def grid(attributes: Sequence[str], *, judged: bool = False) -> pa.Schema:
    """One row per evaluated answer; `units_<attribute>` is the achieved score in continuous level units.

    `judged`: with `judge_score_<attribute>` and `judge_units_<attribute>`, the same by the job's judges.
    """
    kinds = (*_GRID_COLUMNS, *((f"judge_{k}", t) for k, t in _GRID_COLUMNS[1:])) if judged else _GRID_COLUMNS
    per = [(f"{kind}_{a}", t) for a in attributes for kind, t in kinds]
    return _table(
        "grid",
        [
            ("grid_id", pa.string()),
            ("prompt_id", pa.string()),
            ("method", pa.string()),
            ("sample", pa.int32()),
            ("text", pa.string()),
            ("num_tokens", pa.int32()),
            ("finish_reason", pa.string()),
            ("weights_version", pa.int32()),
            *per,
        ],
    )


def drift() -> pa.Schema:
    """One row per evaluated answer of a trained method: its log-prob in nats as sampled, and under the base without a code."""
    return _table(
        "drift",
        [
            ("grid_id", pa.string()),
            ("prompt_id", pa.string()),
            ("method", pa.string()),
            ("logp", pa.float64()),
            ("base_logp", pa.float64()),
        ],
    )


_GRID_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("requested", pa.int8()),
    ("score", pa.float32()),
    ("units", pa.float32()),
)


def digest(*parts: Any, length: int = 16) -> str:
    """Hex hash of JSON-serialisable parts; equal parts give equal ids on every machine and restart."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def prompt_id(messages: Sequence[Message]) -> str:
    """Identity of a conversation: its roles and contents in order."""
    return digest([[m["role"], m["content"]] for m in messages])


def part_of(first_prompt: str) -> str:
    """Name of the part of the prompts table that begins with this prompt."""
    return f"part-{first_prompt}"


def response_id(prompt: str, behaviour: str, sample: int, fingerprint: str) -> str:
    """Identity of an answer to be sampled, known before it exists."""
    return digest(prompt, behaviour, sample, fingerprint)


def first_human_turn(messages: Sequence[Message]) -> str:
    """The text that decides a dialogue's split, so that no opening appears on both sides."""
    return next((m["content"].strip() for m in messages if m["role"] == "user"), "")


def require_columns(names: Sequence[str], *needed: str, stage: str) -> None:
    """Raise DataError when a table lacks a column that `stage` reads."""
    missing = [n for n in needed if n not in names]
    if missing:
        raise DataError(f"{stage}: the table lacks {missing}; it has {sorted(names)}. Rerun the stage before it.")
