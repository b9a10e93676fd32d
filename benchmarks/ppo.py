"""Steps of ctrlray's PPO against TRL's GRPOTrainer on a CPU: samples/s end to end, where the time goes, seconds per weight sync.

Same prepared base, LoRA (rank, targets), dtype and threads; the same prompts in the same order with the same control codes,
8 answers to each in one group, 48 new tokens at most, temperature 1, the same reward function, one update for a step and no
KL; fresh processes in alternating order. ctrlray's side is the train stage itself: Ray, a vLLM engine, a reward actor, a Ray
Train worker. TRL's generates by transformers. Start-up and the first step are not counted. The learning rate is too small to
change answers, so that every step of both has the same work. Needs the dependency group `benchmark`.

    python -m benchmarks.ppo [--repeats 3] [--steps 3]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.common import figure, middle, store
from ctrlray import config, models, pipeline
from ctrlray.control import ControlSpace
from ctrlray.distill import Levels
from ctrlray.ledger import Silent
from ctrlray.rewards.texts import brevity
from ctrlray.tables import Storage

ROOT = Path(__file__).parent.parent
PROMPTS, GROUP, NEW_TOKENS = 8, 8, 48
SAMPLES = PROMPTS * GROUP
RATE = 1e-6
LORA = config.LoRA()
MICRO = 16
"""Sequences in TRL's micro batch, four of which make a step: of 8, 16, 32 and 64 the fastest, in one run of each."""
LEAST_RATIO, MOST_OUTSIDE, MOST_SYNC_S = 1.5, 0.10, 1.5
TRAINING = ("measure_s", "forward_s", "backward_s", "optimizer_s")
PHASES = ("generate_s", "score_s", *TRAINING, "publish_s", "sync_s")
Result = dict[str, Any]


def job(root: str, advantage: str, steps: int) -> config.Job:
    """The job of ctrlray's side: the defaults but for what the comparison fixes."""
    reward = config.FunctionReward(target="ctrlray.rewards.texts:brevity", attributes=("brevity",))
    objective = config.PPO(
        steps=steps,
        prompts_per_step=PROMPTS,
        settings_per_prompt=1,
        group_size=GROUP,
        sampling=config.Sampling(max_tokens=NEW_TOKENS, temperature=1.0, min_p=0.0),
        advantage=advantage,
        learning_rate=RATE,
        kl=config.KL(coefficient=0.0),
    )
    return config.Job(
        name="ppo-benchmark",
        run_root=root,
        control=config.Control(attributes=(config.Attribute(name="brevity", levels=3),)),
        rewards=(reward,),
        train=config.Train(objectives=(objective,), lora=LORA, batch_size=SAMPLES, eval_every=10**6),
    )


class Clock(Silent):
    """When the rollouts of each step were complete."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, rows: int, tokens: int = 0) -> None:
        """The driver reports tokens when a step's rollouts are written."""
        if tokens:
            self.times.append(time.perf_counter())


def run_ctrlray(advantage: str, steps: int, scratch: str) -> Result:
    """Steps from one complete table of rollouts to the next, in seconds by phase, by the train stage.

    Between rollouts k - 1 and k: training on those of k - 1, its weights into the engine, sampling and scoring those of k.
    """
    from ctrlray.train import run as train

    wanted = job(scratch, advantage, steps + 2)
    current = pipeline.run(wanted, ("prompts",))
    rows = current.prompts("train").to_pylist()
    scale = Levels.fit(brevity([[]] * 48, [" ".join(["word"] * n) for n in range(1, NEW_TOKENS + 1)]), 3)
    given = train.Reinforcement(rows, {"brevity": scale}, current.engine_spec(), lambda objective: current.base.folder)
    out, clock = Storage(str(Path(scratch) / "trained")), Clock()
    pipeline.start_ray(wanted.cluster)
    likelihoods = pa.table({"split": ["train"]})  # PPO learns from none of them, but the stage wants to see some
    train.run(likelihoods, out, wanted, current.base, given, out, "benchmark", clock)
    curves = out.sub("ppo").read_json("curves.json")
    points = []
    for k in range(2, steps + 2):
        seconds = clock.times[k] - clock.times[k - 1]
        mine = {n: curves[k][n] if n in ("generate_s", "score_s", "sync_s") else curves[k - 1][n] for n in PHASES}
        rest = seconds - math.fsum(mine.values())
        points.append({"seconds": seconds, "tokens": curves[k]["tokens"], **mine, "rest_s": rest})
    return {"points": points, "hit_rate": curves[-1]["prefix_hit_rate"], "mismatch": curves[-2]["mismatch"]}


def prompt_texts(steps: int) -> list[str]:
    """The prompts of ctrlray's steps in its order, codes included, as text."""
    from ctrlray.train.ppo.rollouts import Prompts

    with tempfile.TemporaryDirectory() as scratch:
        wanted = job(scratch, "grpo", steps)
        current = pipeline.run(wanted, ("prompts",))
        rows = current.prompts("train").to_pylist()
    space = ControlSpace.of(wanted.control)
    renderer = current.base.renderer(space)
    (objective,) = wanted.train.objectives
    assert isinstance(objective, config.PPO)
    order = Prompts(rows, space, renderer, objective, wanted.model.max_context, wanted.seed)
    ids = [ask.prompt_ids for step in range(steps) for ask in order.asks(step) if ask.sample == 0]
    texts = [renderer.tokenizer.decode(i) for i in ids]
    assert [renderer.tokenizer(t)["input_ids"] for t in texts] == [list(i) for i in ids]
    return texts


def run_trl(steps: int, micro: int, scratch: str) -> Result:
    """The same steps by GRPOTrainer, from the end of one to the end of the next."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    base = models.prepare(config.Model(), ControlSpace.of(job(scratch, "grpo", 1).control))
    ends: list[float] = []
    sampled: list[tuple[float, int]] = []

    class OnEnd(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate_single_turn(*given, **named)
            sampled.append((time.perf_counter() - began, sum(map(len, made[0]))))
            return made

    def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return brevity([[]] * len(completions), completions)

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(base.folder, dtype=getattr(torch, dtype())),
        processing_class=base.tokenizer(),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompt_texts(steps + 1)]),
        peft_config=LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets, task_type="CAUSAL_LM"),
        callbacks=[OnEnd()],
        args=GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=SAMPLES // micro,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=0.0,
            num_iterations=1,
            max_steps=steps + 1,
            learning_rate=RATE,
            bf16=dtype() == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    points = [
        {"seconds": ends[k] - ends[k - 1], "tokens": sampled[k][1], "generate_s": sampled[k][0]} for k in range(1, steps + 1)
    ]
    return {"points": points}


def dtype() -> str:
    return models.pick_dtype("auto", gpu=False)


def child(who: str, steps: int, micro: int) -> None:
    """Time one side and print its steps."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as scratch:
        result = run_trl(steps, micro, scratch) if who == "trl" else run_ctrlray(who, steps, scratch)
    print("RESULT " + json.dumps(result), flush=True)


def measure(repeats: int, steps: int, micro: int) -> dict[str, list[Result]]:
    """Each side once per repeat, in a process of its own, every other repeat in reverse order."""
    found: dict[str, list[Result]] = {"grpo": [], "trl": []}
    for repeat in range(repeats):
        for who in list(found)[:: 1 if repeat % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.ppo", "--child", who, "--steps", str(steps), "--micro", str(micro)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
            found[who].append(json.loads(line.removeprefix("RESULT ")))
            print(f"{who}: {middle_of(found[who][-1], 'seconds'):.2f} s a step", flush=True)
    return found


def middle_of(result: Mapping[str, Any], name: str) -> float:
    return statistics.median(p[name] for p in result["points"])


def outside(point: Mapping[str, float]) -> float:
    """Share of a step's time that is neither generation, nor scoring, nor training."""
    inside = ("generate_s", "score_s", *TRAINING)
    return 1 - math.fsum(point[n] for n in inside) / point["seconds"]


def figures(found: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """What issue D asks for, and what stands beside it."""
    ours, trl = found["grpo"], found["trl"]
    value, spread = middle([middle_of(t, "seconds") / middle_of(o, "seconds") for o, t in zip(ours, trl, strict=True)])
    made = [figure("samples/s end to end, ctrlray over TRL", f">= {LEAST_RATIO}", value, value >= LEAST_RATIO, spread)]
    value, spread = middle([statistics.median(outside(p) for p in o["points"]) for o in ours])
    name = "share of ctrlray's step outside generation, scoring and training"
    made.append(figure(name, f"<= {MOST_OUTSIDE}", value, value <= MOST_OUTSIDE, spread))
    value, spread = middle([p["publish_s"] + p["sync_s"] for o in ours for p in o["points"]])
    name = "seconds per weight sync: write, read, merge, reload, cache reset, checksums"
    made.append(figure(name, f"<= {MOST_SYNC_S}", value, value <= MOST_SYNC_S, spread))
    value, spread = middle([o["hit_rate"] for o in ours])
    made.append(figure("prefix cache, share of prompt tokens found", "recorded", value, None, spread))
    value, spread = middle([o["mismatch"] for o in ours])
    made.append(figure("trainer against engine, nats per sampled token", "recorded", value, None, spread))
    for who, results in (("ctrlray", ours), ("TRL", trl)):
        value, spread = middle([SAMPLES / middle_of(r, "seconds") for r in results])
        made.append(figure(f"samples/s, {who}", "recorded", value, None, spread))
        value, spread = middle([statistics.median(p["tokens"] / p["generate_s"] for p in r["points"]) for r in results])
        made.append(figure(f"sampled tokens/s while generating, {who}", "recorded", value, None, spread))
        value, spread = middle([p["tokens"] / SAMPLES for r in results for p in r["points"]])
        made.append(figure(f"tokens of an answer, {who}", "recorded", value, None, spread))
    return made


def breakdown(found: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, float]]:
    """Median seconds of each phase of a step."""
    points = {who: [p for r in results for p in r["points"]] for who, results in found.items()}
    names = {"grpo": ("seconds", *PHASES, "rest_s"), "trl": ("seconds", "generate_s")}
    return {who: {n: round(statistics.median(p[n] for p in ps), 3) for n in names[who]} for who, ps in points.items()}


def main() -> None:
    """Measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro", type=int, default=MICRO, help="sequences in TRL's micro batch")
    parser.add_argument("--child", choices=("grpo", "rloo", "trl"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.steps, options.micro)
        return
    found = measure(options.repeats, options.steps, options.micro)
    settings = {"prompts": PROMPTS, "group": GROUP, "new_tokens": NEW_TOKENS, "dtype": dtype(), "threads": os.cpu_count()}
    print(store("ppo", figures(found), settings=settings, seconds_per_phase=breakdown(found)))


if __name__ == "__main__":
    main()
