"""Scoring: answers/s of ctrlray's score stage against a plain loop over transformers and numpy with the same heads.

The stage is the real one: Ray Data, one reward actor, scores written as they come. The loop renders each conversation with the
tokenizer's own chat template, sorts by length, pads batches, runs AutoModel with all hidden states and applies the heads
in numpy. The stage runs no block above those that the heads read and passes a prompt once for all of its answers; the loop does
neither. Same model, dtype and answers, 4 to each prompt, and all cores for each; one run, alternating, each side in a process
of its own. Start-up and a first block are not counted. Both must give the same scores.

    python -m benchmarks.scoring [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.common import figure, middle, store
from ctrlray import config, models, schema
from ctrlray.ledger import Silent
from ctrlray.tables import Storage, from_rows

ROOT = Path(__file__).parent.parent
PROMPTS, ANSWERS = 96, 4
LOOP_BATCH = 64
"""Of 16, 32 and 64 the fastest for the loop, in one run of each."""
LEAST_RATIO, MOST_DIFFERENCE = 0.95, 0.05
BLOCK = 64
Conversation = list[schema.Message]


def work() -> tuple[list[Conversation], list[list[str]]]:
    """Packaged prompts, and for each some answers of a sentence or two: other prompts' texts, which are as long."""
    from ctrlray.stages.prompts import read_source

    chats = [r.messages for r in read_source(config.PackagedPrompts()) if r.messages]
    texts = [c[-1]["content"] for c in chats]
    answers = [[texts[(7 * i + 31 * k + 5) % len(texts)] + " " + texts[(11 * i + k) % len(texts)] for k in range(ANSWERS)]
               for i in range(PROMPTS)]  # fmt: skip
    return chats[:PROMPTS], answers


class Clock(Silent):
    """When blocks of scores came, and how many answers each held."""

    def __init__(self) -> None:
        self.blocks: list[tuple[float, int]] = []

    def advance(self, rows: int, tokens: int = 0) -> None:
        """One block."""
        if rows:
            self.blocks.append((time.perf_counter(), rows))

    @property
    def rate(self) -> float:
        """Answers/s from the end of the first block to the end of the last."""
        return sum(n for _, n in self.blocks[1:]) / (self.blocks[-1][0] - self.blocks[0][0])


def run_ctrlray(chats: Sequence[Conversation], answers: Sequence[Sequence[str]]) -> tuple[float, dict[str, list[float]]]:
    """The score stage over a finished table of answers."""
    from ctrlray.pipeline import start_ray
    from ctrlray.stages import score

    names = ("helpfulness", "harmlessness")
    pool = config.Pool(cpus=os.cpu_count() or 1)  # Ray gives a reward actor as many threads as it reserves
    control = config.Control(attributes=tuple(config.Attribute(name=n, levels=3) for n in names))
    job = config.Job(name="scoring-benchmark", control=control, score=config.Score(batch_size=BLOCK, pool=pool))
    known = {schema.prompt_id(c): c for c in chats}
    rows = [
        {"response_id": f"{i:04d}-{k}", "prompt_id": schema.prompt_id(chat), "behaviour": "b", "text": text, "token_ids": [],
         "logprob_sum": 0.0, "finish_reason": "stop", "weights_version": 0, "prompt_tokens": 0}
        for i, chat in enumerate(chats)
        for k, text in enumerate(answers[i])
    ]  # fmt: skip
    start_ray(config.Cluster(cpus=(os.cpu_count() or 1) + 1))  # the writer of scores reserves a little beside the actor
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        out = Storage(scratch)
        score.run(from_rows(rows, schema.RESPONSES), known, job, out, clock)
        table: pa.Table = out.read_table("scores", schema.scores(names)).sort_by("response_id")
    return clock.rate, {n: table[f"score_{n}"].to_pylist() for n in names}


def run_loop(
    chats: Sequence[Conversation], answers: Sequence[Sequence[str]], size: int = LOOP_BATCH
) -> tuple[float, dict[str, list[float]]]:
    """What one would write without ctrlray: batches of whole conversations through the model, then the heads."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from ctrlray.rewards.embedded import packaged_heads
    from ctrlray.rewards.heads import Heads

    torch.set_num_threads(os.cpu_count() or 1)
    folder, dtype = models.resolve(config.Model()), getattr(torch, models.pick_dtype("auto", gpu=False))
    heads, tokenizer = Heads.load(packaged_heads()), AutoTokenizer.from_pretrained(folder)
    settings = AutoConfig.from_pretrained(folder)
    if hasattr(settings, "quantization_config"):  # the folder names the file that it was made from; its weights are plain
        del settings.quantization_config
    network = AutoModel.from_pretrained(folder, config=settings, dtype=dtype).eval()
    pairs = encoded(tokenizer, chats, answers)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    scores = np.zeros((len(pairs), len(heads.attributes)), np.float32)
    clock = Clock()
    starts = range(0, len(order), size)
    for start in (starts[len(starts) // 2], *starts):  # the first is not counted
        chosen = order[start : start + size]
        width = max(len(pairs[i][0]) for i in chosen)
        ids = torch.tensor([pairs[i][0] + [tokenizer.eos_token_id] * (width - len(pairs[i][0])) for i in chosen])
        mask = torch.tensor([[1] * len(pairs[i][0]) + [0] * (width - len(pairs[i][0])) for i in chosen])
        with torch.inference_mode():
            hidden = network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        scores[chosen] = heads.score(features(hidden, [pairs[i] for i in chosen], heads.layers, heads.positions))
        clock.advance(len(chosen))
    return clock.rate, {name: scores[:, k].tolist() for k, name in enumerate(heads.attributes)}


def encoded(
    tokenizer: Any, chats: Sequence[Conversation], answers: Sequence[Sequence[str]]
) -> list[tuple[list[int], int]]:
    """Token ids of each conversation with one answer and an end-of-turn token, and how many are the answer's."""
    made = []
    for chat, given in zip(chats, answers, strict=True):
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for text in given:
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            made.append(([*head, *answer, tokenizer.eos_token_id], len(answer)))
    return made


def features(hidden: Any, pairs: Sequence[tuple[list[int], int]], layers: Sequence[int], positions: Sequence[str]) -> Any:
    """Features [B, F] of hidden states; entry k of `hidden` is what block k put out."""
    rows = []
    for b, (ids, count) in enumerate(pairs):
        end = len(ids) - 1
        span = {"last": slice(end - 1, end), "end": slice(end, end + 1), "mean": slice(end - count, end)}
        rows.append(np.concatenate([hidden[k][b, span[p]].float().mean(0).numpy() for k in layers for p in positions]))
    return np.stack(rows)


def measure(repeats: int, size: int) -> dict[str, list[dict[str, Any]]]:
    """Both sides once per repeat, in processes of their own, every other repeat in reverse order."""
    found: dict[str, list[dict[str, Any]]] = {"ctrlray": [], "loop": []}
    for repeat in range(repeats):
        for who in list(found)[:: 1 if repeat % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.scoring", "--child", who, "--batch", str(size)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
            found[who].append(json.loads(line.removeprefix("RESULT ")))
            print(f"{who}: {found[who][-1]['rate']:.1f} answers/s", flush=True)
    return found


def figures(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The ratio, both rates, and how far the scores of the two are apart, in standard deviations of the scores."""
    value, spread = middle([a["rate"] / b["rate"] for a, b in zip(found["ctrlray"], found["loop"], strict=True)])
    made = [figure("answers/s, ctrlray over a transformers loop", f">= {LEAST_RATIO}", value, value >= LEAST_RATIO, spread)]
    apart = []
    for name, theirs in found["loop"][0]["scores"].items():
        ours = found["ctrlray"][0]["scores"][name]
        apart.append(float(np.abs(np.subtract(ours, theirs)).mean() / np.std(theirs)))
    worst = round(max(apart), 4)
    name = "mean distance of the two's scores, in deviations of the scores"
    made.append(figure(name, f"<= {MOST_DIFFERENCE}", worst, worst <= MOST_DIFFERENCE))
    for who, results in found.items():
        value, spread = middle([r["rate"] for r in results])
        made.append(figure(f"answers/s, {who}", "recorded", value, None, spread))
    return made


def main() -> None:
    """Measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=LOOP_BATCH, help="answers in the loop's batch")
    parser.add_argument("--child", choices=("ctrlray", "loop"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        rate, scores = run_ctrlray(*work()) if options.child == "ctrlray" else run_loop(*work(), options.batch)
        print("RESULT " + json.dumps({"rate": rate, "scores": scores}), flush=True)
        return
    found = measure(options.repeats, options.batch)
    print(store("scoring", figures(found), answers=PROMPTS * ANSWERS, loop_batch=options.batch))


if __name__ == "__main__":
    main()
