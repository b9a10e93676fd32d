"""The GPU mode of `benchmarks.training`: FLOP/s of training steps at the shape of a 1B Llama, against what a matmul reaches.

Random weights in bfloat16, LoRA, tree rows under FlexAttention. Counted per token: 2 FLOP per weight that it meets going
forward and as many for its gradient going back (a frozen weight has no gradient of its own), the output layer for answers'
tokens alone. Attention and adapters are not counted, so the share is a lower bound.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch

from benchmarks.common import figure, middle
from ctrlray import config
from ctrlray.train.batches import TrainExample, shard, tree_rows

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
PROMPT, ANSWER, PER_PROMPT, EXAMPLES = 512, 256, 4, 64
MICRO_BATCH_TOKENS = 16384
MATMUL = 8192


def matmul_flops(repeats: int = 20) -> float:
    """FLOP/s of a large square product in bfloat16."""
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * MATMUL**3 * repeats / (time.perf_counter() - began)


def learner() -> Any:
    """A frozen random Llama with adapters, as `load_learner` makes one of a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ctrlray.train.models import Learner, add_lora

    torch.manual_seed(0)
    settings = AutoConfig.for_model("llama", tie_word_embeddings=False, **SHAPE)
    with torch.device("cuda"):
        network = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    network.requires_grad_(False)
    made = Learner(network, config.ExMATE(), torch.bfloat16, "cuda")
    if made.path != "flex":
        raise SystemExit(f"unwanted fallback: a Llama trains on the path {made.path!r}")
    add_lora(network, config.LoRA())
    return made.to("cuda").train()


def batch(step: int) -> list[tuple[int, TrainExample]]:
    """Random tokens: prompts of four answers, each under a right and a wrong code."""
    rng = torch.Generator().manual_seed(step)
    draw = lambda n: tuple(torch.randint(100, 100_000, (n,), generator=rng).tolist())  # noqa: E731
    made = []
    for i in range(EXAMPLES // PER_PROMPT):
        prompt = draw(PROMPT)
        for j in range(PER_PROMPT):
            answer = draw(ANSWER)
            example = TrainExample(((*prompt, 5), (*prompt, 6)), (answer, answer), 1.0, str(i))
            made.append((i * PER_PROMPT + j, example))
    return made


def gpu_figures(steps: int) -> list[dict[str, Any]]:
    """Steps under DeepSpeed on one GPU, the first one left out. Raises SystemExit where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device; without the flag the benchmark runs on the processor")
    import torch.distributed as dist

    from ctrlray.train.engine import Trainer
    from ctrlray.train.models import parameter_groups

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    settings = config.Train(gpus_per_worker=1, micro_batch_tokens=MICRO_BATCH_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("nccl", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        made = learner()
        trainer = Trainer(made, parameter_groups(made, settings), settings, gpu=True)
        blocks = sum(p.numel() for n, p in made.network.named_parameters() if "layers" in n and not p.requires_grad)
        head = SHAPE["vocab_size"] * SHAPE["hidden_size"]
        rates, tokens_per_s = [], []
        for step in range(steps + 1):
            rows = tree_rows(batch(step), wrong=True, share=True)
            batches = [made.collated(m, 0) for m in shard(rows, 1, MICRO_BATCH_TOKENS)[0]]
            answers = float(sum(b.mask_NT.sum() for b in batches))
            torch.cuda.synchronize()
            began = time.perf_counter()
            trainer.step(batches, 1.0, ranks=1, num_tokens=answers / 2, num_wrong=float(EXAMPLES))
            torch.cuda.synchronize()
            seconds, tokens = time.perf_counter() - began, sum(r.num_tokens for r in rows)
            rates.append(4 * (blocks * tokens + head * answers) / seconds)
            tokens_per_s.append(tokens / seconds)
        dist.destroy_process_group()
    most = matmul_flops()
    share, spread = middle([r / most for r in rates[1:]])
    return [
        figure("achieved over matmul FLOP/s, 1B Llama, ExMATE, 4 answers per prompt", "recorded", share, None, spread),
        figure("matmul TFLOP/s, bfloat16", "recorded", round(most / 1e12, 1), None),
        figure("tokens/s", "recorded", *_unjudged(tokens_per_s[1:])),
        figure("peak GPU memory, GiB", "recorded", round(torch.cuda.max_memory_allocated() / 2**30, 2), None),
    ]


def _unjudged(values: list[float]) -> tuple[float, None, list[float]]:
    value, spread = middle(values)
    return value, None, spread
