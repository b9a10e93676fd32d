"""The small job of a trial: a random model, engines that are simulated, and training that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.chaos.nodes import GROUP
from benchmarks.chaos.plan import PPO

PROMPTS, EVAL, BATCH = 12, 6, 4
BEHAVIOURS: tuple[dict[str, str], ...] = (
    {"name": "plain"},
    {"name": "short", "system": "Answer in a few words."},
    {"name": "long", "system": "Answer at length."},
    {"name": "sorry", "system": "Decline.", "prefix": "Sorry, no."},
)
"""As many as samples: no two requests are alike, so no two simulated answers have to be."""
BLOCKS = PROMPTS * len(BEHAVIOURS) // BATCH
METHODS = 3
"""Parts of the grid's answers: two baselines and the trained one."""
NAMES = ("brevity", "variety")
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "exmate": {"type": "exmate"},
    PPO: {
        "type": PPO,
        "steps": 10,
        "prompts_per_step": 2,
        "group_size": 1,
        "batch_size": 4,
        "advantage": "gae",
        "sampling": {"max_tokens": 12, "temperature": 1.0, "min_p": 0},
    },
}


def job(model: Path, root: Path, method: str, address: str | None = None) -> dict[str, Any]:
    """As YAML would give it; with an `address`, all actors are kept on the nodes beside the head."""
    pool: dict[str, Any] = {"min_size": 2, "max_size": 2, "cpus": 0.25, "nodes": GROUP if address else None}
    return {
        "name": "simulated",
        "run_root": str(root),
        "model": {"name": str(model), "max_context": 1024, "dtype": "float32"},
        "control": {"attributes": [{"name": name, "levels": 2} for name in NAMES]},
        "rewards": [{"type": "function", "target": "benchmarks.chaos.simulated:slow_lengths", "attributes": list(NAMES)}],
        "prompts": {"train": PROMPTS, "eval": EVAL},
        "generate": {
            "samples": len(BEHAVIOURS),
            "batch_size": BATCH,
            "sampling": {"max_tokens": 16, "temperature": 1.0},
            "behaviours": list(BEHAVIOURS),
            "pool": pool,
        },
        "score": {"batch_size": BATCH, "pool": pool | {"min_size": 1, "max_size": 1}},
        "distill": {"strategy": "none", "keep_truncated": True, "valid_fraction": 0.25, "max_examples": 48},
        "train": {
            "objectives": [_OBJECTIVES[method]],
            "epochs": 3,
            "batch_size": 4,
            "eval_every": 3,
            "lora": {"rank": 4},
            "max_failures": 3,
            "nodes": GROUP if address else None,
        },
        "evaluate": {"sampling": {"max_tokens": 16, "temperature": 0.0}, "batch_size": BATCH, "bootstrap": 100},
        "export": {"dtype": "float32"},
        "cluster": {"address": address, "stall_timeout_s": 200},
    }
