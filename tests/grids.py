"""Evaluation grids made up for tests."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa

from ctrlray import config, schema
from ctrlray.metrics.bootstrap import Floats
from ctrlray.metrics.grid import evaluate_grid

CONTROL = config.Control(attributes=(config.Attribute(name="kind", levels=3), config.Attribute(name="brief", levels=3)))
ONE = config.Control(attributes=(config.Attribute(name="kind", levels=3),))
CELLS = list(itertools.product((1, 2, 3), repeat=2))


def everyone(num_prompts: int) -> Floats:
    return np.ones((1, num_prompts))


def arrays(*columns):
    return [np.asarray(c, float) for c in columns]


def grid(rows, control=CONTROL) -> pa.Table:
    """Rows of (method, prompt, requested levels, units, tokens, text)."""
    names = [a.name for a in control.attributes]
    dicts = []
    for i, (method, prompt, requested, units, tokens, text) in enumerate(rows):
        dicts.append(
            {
                "grid_id": f"g{i}",
                "prompt_id": prompt,
                "method": method,
                "sample": 0,
                "text": text,
                "num_tokens": tokens,
                "finish_reason": "stop",
                "weights_version": 0,
                **{f"requested_{n}": r for n, r in zip(names, requested, strict=True)},
                **{f"score_{n}": u for n, u in zip(names, units, strict=True)},
                **{f"units_{n}": u for n, u in zip(names, units, strict=True)},
            }
        )
    return pa.Table.from_pylist(dicts, schema=schema.grid(names))


def dial(method, units_of, num_prompts=12, seed=0):
    """A grid of every cell on every prompt; `units_of(levels, prompt noise, row noise)` gives the achieved units."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(num_prompts):
        per_prompt = rng.normal(size=2)
        for cell in CELLS:
            units = [float(np.float32(u)) for u in units_of(np.array(cell), per_prompt, rng.normal(size=2))]
            rows.append((method, f"p{p:02d}", cell, units, int(rng.integers(5, 60)), f"{p} {units}"))
    return rows


def evaluate(rows, control=CONTROL, num_bootstrap=200, seed=0):
    return evaluate_grid(grid(rows, control), control, num_bootstrap, seed)
