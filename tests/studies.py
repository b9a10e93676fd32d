"""A finished run that was never computed, for tests of studies: answers whose texts say nothing of their levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctrlray import config, pipeline, schema
from ctrlray.schema import digest
from ctrlray.tables import from_rows

NAMES = ["helpfulness", "safety"]
DONE = {"rows_in": 1, "rows_out": 1, "dropped": {}, "quarantined": {}, "tokens": None, "facts": {}, "seconds": 1.0, "started": ""}
CELLS = ((1, 1), (1, 2), (2, 1), (2, 2))
NASTY = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u202eשלום & \"quotes\" '"


def text_of(prompt: str, method: str, levels: tuple[int, int]) -> str:
    """An answer's text; a rater cannot tell its level from it, and a test can."""
    return f"Words {digest('text', prompt, method, levels, length=6)} about it. {NASTY}"


def run_with_grid(root: Path, methods: tuple[str, ...] = ("start", "exmate"), num_prompts: int = 4) -> pipeline.Run:
    """A run of the smoke job with scored answers on a 2 x 2 grid; the reward is twice the requested level."""
    run = pipeline.run(config.load_job("smoke", [f"run_root={root}"]), ["prompts"])
    prompts = sorted(p["prompt_id"] for p in run.prompts("eval").to_pylist())[:num_prompts]
    rows = [_row(p, m, levels) for p in prompts for m in methods for levels in CELLS]
    run.out("evaluate").write_table(from_rows(rows, schema.grid(NAMES)), "grid")
    run.out("evaluate").write_json(DONE, "result.json")
    return run


def run_with_judge(root: Path) -> pipeline.Run:
    """The same with judges, whose scores fall where the levels rise, and with a set of one prompt."""
    judges = "rewards=[{type: embedded}, {type: tfidf, judge: true}]"
    sets = "evaluate.sets=[{name: odd, sources: [{type: packaged}]}]"
    run = pipeline.run(config.load_job("smoke", [f"run_root={root}", judges, sets]), ["prompts"])
    question = {"role": "user", "content": "An odd question?"}
    asked = {"prompt_id": "odd-1", "messages": [question], "source": "odd", "label": ""}
    out = run.out("evaluate")
    out.sub("sets", "odd").write_table(from_rows([asked], schema.SET_PROMPTS), "prompts")
    own = sorted(p["prompt_id"] for p in run.prompts("eval").to_pylist())
    for place, prompts in ((out, own), (out.sub("sets", "odd"), ["odd-1"])):
        rows = [_row(p, "exmate", levels) | _judged(levels) for p in prompts for levels in CELLS]
        place.write_table(from_rows(rows, schema.grid(NAMES, judged=True)), "grid")
    out.write_json(DONE, "result.json")
    return run


def _row(prompt: str, method: str, levels: tuple[int, int]) -> dict[str, Any]:
    asked = dict(zip(NAMES, levels, strict=True))
    return {
        "grid_id": digest(prompt, method, levels),
        "prompt_id": prompt,
        "method": method,
        "sample": 0,
        "text": "One answer to all." if method == "start" else text_of(prompt, method, levels),
        "num_tokens": 5,
        "finish_reason": "stop",
        "weights_version": 0,
        **{f"requested_{n}": level for n, level in asked.items()},
        **{f"score_{n}": 2.0 * level for n, level in asked.items()},
        **{f"units_{n}": 1.0 for n in NAMES},
    }


def _judged(levels: tuple[int, int]) -> dict[str, float]:
    asked = dict(zip(NAMES, levels, strict=True))
    return {f"judge_score_{n}": -1.0 * level for n, level in asked.items()} | {f"judge_units_{n}": 1.0 for n in NAMES}


def add_examples(run: pipeline.Run, per_prompt: int = 4) -> None:
    """Training rows of every prompt in different cells, with scores that order them against their levels."""
    examples, scores = [], []
    for prompt in run.prompts("train").to_pylist():
        for i in range(per_prompt):
            levels = (i % 2 + 1, i // 2 % 2 + 1)
            name = digest("example", prompt["prompt_id"], i)
            examples.append(
                {
                    "example_id": name,
                    "prompt_id": prompt["prompt_id"],
                    "split": "train",
                    "messages": prompt["messages"],
                    "response": text_of(prompt["prompt_id"], "pool", levels),
                    "token_ids": [1],
                    "counterfactuals": [],
                    "weight": 1.0,
                    **{f"level_{n}": level for n, level in zip(NAMES, levels, strict=True)},
                }
            )
            scores.append({"response_id": name} | {f"score_{n}": -float(x) for n, x in zip(NAMES, levels, strict=True)})
    run.out("distill").write_table(from_rows(examples, schema.examples(NAMES)), "examples")
    run.out("score").write_table(from_rows(scores, schema.scores(NAMES)), "scores")
    run.out("distill").write_json(DONE, "result.json")
