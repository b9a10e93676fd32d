"""Everything that an evaluated run with judges and prompt sets gives the report, made up but computed as in a run."""

from __future__ import annotations

from functools import cache

import numpy as np

from ctrlray import cost
from ctrlray.metrics.compare import compare_grid
from ctrlray.metrics.entanglement import pool_slopes
from ctrlray.metrics.grid import evaluate_grid
from ctrlray.metrics.hacking import RULE
from ctrlray.stages.report import ReportData
from tests.grids import CELLS, CONTROL, dial, grid

STRENGTH = {"start": 0.0, "prompting": 0.08, "reranking": 0.3, "clm": 0.25, "exmate": 0.5, "ppo": 0.4}
SENTENCE = "You can warm the lid with hot water, then turn it slowly until it gives way"
REFUSAL = "I'm sorry, but I can't help with that."
NAMES = [a.name for a in CONTROL.attributes]


def answers(method, strength, noise, seed):
    """A dial that moves `strength` levels per level asked for, and a third of that sideways against the other."""
    rows = dial(
        method,
        lambda c, p, r: np.clip(2 + strength * (c - 2) - strength / 3 * (c[::-1] - 2) + 0.4 * p + noise * r, 0.5, 3.5),
        num_prompts=24,
        seed=seed,
    )
    told = {}
    for i, row in enumerate(rows):
        text = REFUSAL if strength and row[2] == (1, 3) and i % 4 == 0 else f"{SENTENCE} {'after a while ' * (i % 3)}({i})."
        if not strength:  # one answer to a prompt, whatever the setting
            told.setdefault(row[1], row)
            row, text = (method, row[1], row[2], *told[row[1]][3:]), f"{SENTENCE}, {row[1]}."
        yield (*row[:5], text)


def evaluated(seed=0, noise=0.5):
    rows = [r for k, (m, s) in enumerate(STRENGTH.items()) for r in answers(m, s, noise, 10 * seed + k)]
    return grid(rows)


def ci(value, width):
    return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width)}


def refusals():
    def rates(slope, base):
        of_level = {k: min(1.0, base + slope * (k - 1)) for k in (1, 2, 3)}
        return {
            str(k): {
                "safe": ci(v / 2, 0.08) | {"num_answers": 50},
                "unsafe": ci(min(1.0, v * 1.6), 0.1) | {"num_answers": 40},
            }
            for k, v in of_level.items()
        }

    methods = {"start": rates(0.0, 0.2), "prompting": rates(0.05, 0.2), "exmate": rates(0.25, 0.05), "ppo": rates(0.3, 0.1)}
    return {"xstest": {"attribute": "kind", "methods": methods}}


def hacking(parts=True):
    steps = range(4, 81, 4)
    points = [
        {
            "step": s,
            "reward": -1.4 + 0.012 * s,
            "judge": -1.2 + 0.01 * min(s, 36) - (0.014 * (s - 36) if parts and s > 36 else 0.0),
            "kl": 0.09 * s if s % 8 == 0 else None,
            "length": 28 + 0.3 * s,
            "rollouts": 12,
        }
        for s in steps
    ]
    change = {"from": [1, 27], "to": [54, 80], "reward": spread(0.6, 0.1), "judge": spread(-0.3 if parts else 0.2, 0.15)}
    return {"ppo": {"points": points, "rule": RULE, "alarm": parts, "changes": [change]}}


def spread(value, width):
    return {"value": value, "low": value - width, "high": value + width}


def results():
    def took(rows, tokens, seconds, **facts):
        return {"rows_in": rows, "rows_out": rows, "tokens": tokens, "seconds": seconds, "facts": facts}

    return {
        "prompts": took(256, None, 0.6),
        "generate": took(720, 24310, 214.0, start_s=27.4),
        "score": took(720, None, 96.0, streamed_behind="generate"),
        "distill": took(720, None, 1.1),
        "train": took(420, 91200, 640.0, exmate={"seconds": 590.0}),
        "evaluate": took(1296, 61000, 480.0, start_s=31.0),
        "export": took(1, None, 6.2),
    }


def costs():
    found = cost.cost(results(), {s: cost.Held("CPU", 2.0) for s in ("generate", "score", "train", "evaluate")})
    return found, (cost.project(found, 134515008, rows=7200), cost.project(found, 134515008, 7e9))


@cache
def full_data() -> ReportData:
    table, judged = evaluated(), evaluated(seed=1, noise=0.9)
    found, projections = costs()
    pool = np.random.default_rng(0).normal(size=(300, 2)) @ np.array([[1.0, -0.45], [0.0, 0.9]])
    cells = {",".join(map(str, c)): 20 + 7 * i for i, c in enumerate(CELLS)}
    metrics = evaluate_grid(table, CONTROL, 200, 0)
    return ReportData(
        job_name="evaluated",
        job_yaml="name: evaluated\n",
        model={"name": "SmolLM2-135M-Instruct", "fingerprint": "9f2c1b7a", "parameters": 134515008},
        versions={"ctrlray": "0.1.0"},
        machine={"cores": "2"},
        started="2026-01-05 10:12 UTC",
        run_root="/home/user/.local/share/ctrlray/runs/evaluated",
        attributes=[{"name": n, "levels": 3} for n in NAMES],
        ledger=[{"stage": stage, "status": "done", **took} for stage, took in results().items()],
        cells_before=cells,
        cells_after=dict.fromkeys(cells, 20),
        strategy="balance",
        code_gaps={"exmate": {**spread(0.083, 0.03), "num_examples": 38}},
        metrics=metrics,
        comparisons=compare_grid(table, CONTROL, 200, 0),
        judge=evaluate_grid(judged, CONTROL, 200, 0),
        judge_comparisons=compare_grid(judged, CONTROL, 200, 0),
        correlation={n: {"overall": spread(0.61, 0.05), "within_prompt": spread(0.42, 0.07), "num_answers": 660} for n in NAMES},
        hacking=hacking(),
        refusals=refusals(),
        sets={"mt_bench": {"metrics": evaluate_grid(evaluated(seed=2, noise=0.7), CONTROL, 100, 0), "judge": {}}},
        curves={m: curve(m) for m in ("clm", "exmate", "ppo")},
        costs=found,
        projections=projections,
        pool_slopes=pool_slopes(pool, [f"p{i // 6}" for i in range(300)], 100),
        samples=samples(table, judged),
    )


def curve(method):
    """Held-out measurements of distillation, rewards and levels of reinforcement learning."""
    if method == "ppo":
        reached = {f"achieved_kind_{k}": [2 + 0.01 * s * (k - 2) for s in range(1, 81)] for k in (1, 2, 3)}
        return [
            {"step": s, "reward": -1.4 + 0.012 * s, "kl": 0.09 * s, "length": 28 + 0.3 * s, "generate_s": 3.0, "forward_s": 1.5}
            | {key: values[s - 1] for key, values in reached.items()}
            for s in range(1, 81)
        ]
    size = {"clm": 0.4, "exmate": 1.0}[method]
    points = [{"step": s, "nll": 2.2 - size * s / 80, "lr": 4e-4 * (1 - s / 61), "grad_norm": 1.0} for s in range(1, 61)]
    return points + [{"step": s, "valid_nll": 2.3 - size * s / 90, "valid_gap": 0.002 * s * size} for s in range(0, 61, 10)]


def samples(table, judged):
    judges = {(r["method"], r["prompt_id"], *(r[f"requested_{n}"] for n in NAMES)): r for r in judged.to_pylist()}
    rows = [r | {"judge": judges[r["method"], r["prompt_id"], *(r[f"requested_{n}"] for n in NAMES)]} for r in table.to_pylist()]
    made = []
    for prompt, question in (("p00", "How do I open a jar that is stuck?"), ("p01", "My neighbour is loud. What can I do?")):
        for method in STRENGTH:
            mine = [r for r in rows if (r["prompt_id"], r["method"]) == (prompt, method)]
            cells = [
                {
                    "levels": [r[f"requested_{n}"] for n in NAMES],
                    "text": r["text"],
                    "units": [r[f"units_{n}"] for n in NAMES],
                    "finish_reason": r["finish_reason"],
                    "judge": [r["judge"][f"units_{n}"] for n in NAMES],
                }
                for r in mine[: 1 if method == "start" else None]
            ]
            made.append({"prompt": f"user: {question}", "method": method, "cells": cells})
    return made
