"""A job for a tiny random model: every stage on real engines in a minute or two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tiny_job(model: Path, root: object, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The job as YAML would give it; `changes` are `a.b: value`."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "run_root": str(root),
        "model": {"name": str(model), "max_context": 512, "dtype": "float32"},
        "control": {"attributes": [{"name": "brevity", "levels": 2}, {"name": "variety", "levels": 2}]},
        "rewards": [{"type": "function", "target": "tests.fakes:length_reward", "attributes": ["brevity", "variety"]}],
        "prompts": {"train": 8, "eval": 3},
        "generate": {
            "samples": 4,
            "batch_size": 16,
            "sampling": {"max_tokens": 12, "temperature": 1.0},
            "behaviours": [{"name": "plain"}, {"name": "sorry", "system": "Decline.", "prefix": "Sorry, no."}],
        },
        "distill": {"strategy": "none", "keep_truncated": True, "valid_fraction": 0.25, "max_examples": 32},
        "train": {"epochs": 2, "batch_size": 8, "eval_every": 2, "lora": {"rank": 4}},
        "evaluate": {"sampling": {"max_tokens": 12, "temperature": 0.0}, "bootstrap": 100},
        "export": {"dtype": "float32"},
    }
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        node = raw
        for part in parents:
            node = node[part]
        node[last] = value
    return raw
