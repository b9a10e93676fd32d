"""Training steps of ctrlray against TRL's SFTTrainer: examples/s, peak memory, where the time goes, and ExMATE's price.

Same base model, token ids, batches of 16 examples, LoRA (rank, targets), dtype and threads; fresh processes in alternating
order; start-up and the first step are not counted. Examples come in the
same order, their lengths a quarter apart at most. Needs the dependency group `benchmark` (`uv pip install --group benchmark`).

    python -m benchmarks.training [--repeats 3] [--steps 3]
    python -m benchmarks.training --gpu     # a 1B-class Llama with random weights on one GPU: achieved against matmul FLOP/s
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import figure, middle, store
from ctrlray import config, models
from ctrlray.control import ControlSpace
from ctrlray.train.batches import TrainExample, shard, tree_rows

ROOT = Path(__file__).parent.parent
EXAMPLES = 16
TOKENS = 144
"""Mean length of prompt and answer together; each answer is 25% longer or shorter at most."""
RATIOS = {"2:1": (96, 48), "1:1": (72, 72), "1:2": (48, 96)}
SPACE = ControlSpace((config.Attribute(name="helpfulness", levels=3), config.Attribute(name="safety", levels=3)))
LORA = config.LoRA()
CODE = 2


class Task(NamedTuple):
    """One thing to time, in a process of its own with others of its kind."""

    name: str
    who: str
    ratio: str
    per_prompt: int
    objective: str = "clm"
    share: bool = True


TASKS = [
    Task("ctrlray, 1 answer per prompt", "ctrlray", "2:1", 1),
    Task("TRL, 1 answer per prompt", "trl", "2:1", 1),
    Task("ctrlray, 4 answers per prompt", "ctrlray", "2:1", 4),
    Task("TRL, 4 answers per prompt", "trl", "2:1", 4),
    *(Task(f"CLM, {r}", "ctrlray", r, 1) for r in RATIOS),
    *(Task(f"ExMATE in one pass, {r}", "ctrlray", r, 1, "exmate") for r in RATIOS),
    Task("ExMATE in two passes, 2:1", "ctrlray", "2:1", 1, "exmate", share=False),
]


def examples(task: Task, control_ids: Sequence[int], vocabulary: int, steps: int) -> list[list[TrainExample]]:
    """Batches of random tokens at the task's lengths; the same for every trainer."""
    rng = random.Random(7)
    prompt_size, answer_size = RATIOS[task.ratio]
    right, wrong = control_ids[:1] + control_ids[3:4], control_ids[1:2] + control_ids[4:5]
    made = []
    for _ in range(steps):
        batch = []
        for i in range(EXAMPLES // task.per_prompt):
            prompt = tuple(rng.randrange(100, vocabulary) for _ in range(prompt_size - CODE))
            for _ in range(task.per_prompt):
                size = round(answer_size * rng.uniform(0.75, 1.25))
                answer = tuple(rng.randrange(100, vocabulary) for _ in range(size))
                batch.append(TrainExample((prompt + tuple(right), prompt + tuple(wrong)), (answer, answer), 1.0, str(i)))
        made.append(batch)
    return made


def settings(task: Task) -> config.Train:
    """The job's defaults but for what the task varies, and micro batches of as many tokens as TRL's."""
    return config.Train(batch_size=EXAMPLES, share_prompts=task.share, micro_batch_tokens=MICRO * TOKENS)


def objective(task: Task) -> config.Objective:
    return config.ExMATE() if task.objective == "exmate" else config.CLM()


def run_ctrlray(task: Task, steps: int) -> Iterator[dict[str, float]]:
    """Seconds of each step and of its phases, by the trainer that Ray Train's workers run."""
    import torch.distributed as dist

    from ctrlray.train.engine import Trainer
    from ctrlray.train.models import load_learner, parameter_groups

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    base, given = models.prepare(config.Model(), SPACE), settings(task)
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        learner = load_learner(base.folder, objective(task), given, base.control_ids, dtype(), "cpu")
        if not learner.shares:
            raise SystemExit(f"unwanted fallback: {base.folder} trains on the path {learner.path!r}")
        trainer = Trainer(learner, parameter_groups(learner, given), given, gpu=False)
        for batch in examples(task, base.control_ids, vocabulary(base), steps):
            began = time.perf_counter()
            rows = tree_rows(list(enumerate(batch)), wrong=task.objective == "exmate", share=task.share)
            branches = [b for r in rows for b in r.branches]
            totals = {
                "num_tokens": float(sum(len(b.token_ids) for b in branches if b.right)),
                "num_wrong": float(sum(not b.right for b in branches)),
            }
            batches = [learner.collated(m, 0) for m in shard(rows, 1, given.micro_batch_tokens)[0]]
            data = time.perf_counter() - began
            trainer.step(batches, 1.0, ranks=1, **totals)
            tokens = sum(r.num_tokens for r in rows)
            yield {"seconds": time.perf_counter() - began, "data": data, "tokens": tokens, **trainer.phases}
        dist.destroy_process_group()


def run_trl(task: Task, steps: int) -> Iterator[dict[str, float]]:
    """The same examples through SFTTrainer, answers only in the loss."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base = models.prepare(config.Model(), SPACE)
    flat = [e for batch in examples(task, base.control_ids, vocabulary(base), steps) for e in batch]
    rows = [
        {
            "input_ids": [*e.prompts[0], *e.responses[0]],
            "completion_mask": [0] * len(e.prompts[0]) + [1] * len(e.responses[0]),
        }
        for e in flat
    ]
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    network = AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, dtype()))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=network,
            processing_class=base.tokenizer(),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets, task_type="CAUSAL_LM"),
            callbacks=[Clock()],
            args=SFTConfig(
                output_dir=scratch,
                per_device_train_batch_size=MICRO,
                gradient_accumulation_steps=EXAMPLES // MICRO,
                max_steps=steps,
                bf16=dtype() == "bfloat16",
                use_cpu=True,
                completion_only_loss=True,
                gradient_checkpointing=False,
                train_sampling_strategy="sequential",
                dataloader_pin_memory=False,
                logging_steps=10**6,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                learning_rate=4e-4,
            ),
        )
        trainer.train()
    for i in range(steps):
        mine = rows[i * EXAMPLES : (i + 1) * EXAMPLES]
        yield {"seconds": times[2 * i + 1] - times[2 * i], "tokens": sum(len(r["input_ids"]) for r in mine)}


MICRO = 8
"""Sequences in TRL's micro batch, two of which make a step: of 4, 8 and 16 the fastest, in one run of each."""


def dtype() -> str:
    return models.pick_dtype("auto", gpu=False)


def vocabulary(base: models.PreparedBase) -> int:
    """Ids below the control tokens."""
    return base.control_ids[0] - 1


def child(index: int, steps: int) -> None:
    """Time one task and print its steps, the first left out, and the peak of resident memory in GiB."""
    task = TASKS[index]
    torch.set_num_threads(os.cpu_count() or 1)
    run = run_ctrlray if task.who == "ctrlray" else run_trl
    points = list(run(task, steps + 1))[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps({"points": points, "peak": peak}), flush=True)


def measure(repeats: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Every task once per repeat, each in a process of its own, every other repeat in reverse order."""
    found: dict[str, list[dict[str, Any]]] = {t.name: [] for t in TASKS}
    for repeat in range(repeats):
        for i in list(range(len(TASKS)))[:: 1 if repeat % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.training", "--child", str(i), "--steps", str(steps)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
            found[TASKS[i].name].append(json.loads(line.removeprefix("RESULT ")))
            last = found[TASKS[i].name][-1]
            print(f"{TASKS[i].name}: {step_seconds(last):.2f} s a step, peak {last['peak']:.2f} GiB", flush=True)
    return found


def step_seconds(result: dict[str, Any]) -> float:
    return statistics.median(p["seconds"] for p in result["points"])


def ratio(found: dict[str, list[dict[str, Any]]], a: str, b: str, of: Any = step_seconds) -> tuple[float, list[float]]:
    """B / a, repeat by repeat."""
    return middle([of(y) / of(x) for x, y in zip(found[a], found[b], strict=True)])


def figures(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What issue C asks for, and what stands beside it."""
    made = []
    for name, target, least in (("1 answer per prompt", ">= 1.1", 1.1), ("4 answers per prompt", ">= 1.5", 1.5)):
        value, spread = ratio(found, f"ctrlray, {name}", f"TRL, {name}")
        made.append(figure(f"examples/s, ctrlray over TRL, {name}, P:R 2:1", target, value, value >= least, spread))
    for name in ("1 answer per prompt", "4 answers per prompt"):
        value, spread = ratio(found, f"TRL, {name}", f"ctrlray, {name}", lambda r: r["peak"])
        made.append(figure(f"peak resident memory, ctrlray over TRL, {name}", "<= 0.7", value, value <= 0.7, spread))
    for name, (p, r) in RATIOS.items():
        limit = (p + 2 * r) / (p + r)
        value, spread = ratio(found, f"CLM, {name}", f"ExMATE in one pass, {name}")
        label = f"ExMATE step over CLM step, P:R {name}; token count gives {limit:.2f}"
        made.append(figure(label, f"<= {1.15 * limit:.2f}", value, value <= 1.15 * limit, spread))
    value, spread = ratio(found, "CLM, 2:1", "ExMATE in two passes, 2:1")
    made.append(figure("ExMATE in two passes over CLM step, P:R 2:1", "recorded", value, None, spread))
    for name, results in found.items():
        value, spread = middle([statistics.median(p["tokens"] / p["seconds"] for p in r["points"]) for r in results])
        made.append(figure(f"tokens/s, {name}", "recorded", value, None, spread))
        value, spread = middle([EXAMPLES / step_seconds(r) for r in results])
        made.append(figure(f"examples/s, {name}", "recorded", value, None, spread))
    return made


def breakdown(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Median seconds of each phase of ctrlray's steps."""
    phases = ("data", "forward", "backward", "optimizer")
    ours = {t.name for t in TASKS if t.who == "ctrlray"}
    points = {name: [p for r in results for p in r["points"]] for name, results in found.items() if name in ours}
    return {name: {k: round(statistics.median(p[k] for p in ps), 3) for k in phases} for name, ps in points.items()}


def main() -> None:
    """Measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.steps)
    elif options.gpu:
        from benchmarks.training_gpu import gpu_figures

        print(store("training_gpu", gpu_figures(options.steps)))
    else:
        found = measure(options.repeats, options.steps)
        print(store("training", figures(found), seconds_per_phase=breakdown(found)))


if __name__ == "__main__":
    main()
