"""Generation: tokens/s of ctrlray's Ray Data path against raw `vllm.LLM.generate` and against transformers.

One run, alternating order, fresh engines in processes of their own; start-up is not counted. All three get the same
prompts and limit of new tokens, and vLLM the same sampling, arguments, thread binding and batch.

    python benchmarks/generation.py [--requests 192] [--tokens 48] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.data

from benchmarks.common import figure, middle, store
from ctrlray import config, models, schema
from ctrlray.control import ControlSpace, with_system
from ctrlray.engine.engine import EngineSpec
from ctrlray.quiet import quiet_ray
from ctrlray.stages import generate
from ctrlray.stages.prompts import read_source
from ctrlray.tables import Storage, from_rows
from ctrlray.telemetry import Where

HF_BATCH = 32


class RawVLLM:
    """`vllm.LLM.generate` on the whole list at once, without ctrlray's engine, tables or streaming."""

    def __init__(self, arguments: dict[str, Any], environment: dict[str, str]) -> None:
        os.environ.update(environment)
        from vllm import LLM

        self._llm = LLM(**arguments)

    def run(self, prompts: list[list[int]], sampling: dict[str, Any], batch: int) -> tuple[int, float]:
        from vllm import SamplingParams

        began, tokens = time.perf_counter(), 0
        for start in range(0, len(prompts), batch):
            requests = [{"prompt_token_ids": p} for p in prompts[start : start + batch]]
            outputs = self._llm.generate(requests, SamplingParams(**sampling), use_tqdm=False)
            tokens += sum(len(o.outputs[0].token_ids) for o in outputs)
        return tokens, time.perf_counter() - began


class Transformers:
    """`generate` of transformers, left-padded batches."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[int, float]:
        import torch

        began = time.perf_counter()
        for start in range(0, len(prompts), HF_BATCH):
            batch = prompts[start : start + HF_BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            self._model.generate(ids, attention_mask=mask, do_sample=True, temperature=0.8, min_p=0.05, max_new_tokens=tokens)
        return tokens * len(prompts), time.perf_counter() - began


class TimedGenerate(generate.GenerateBatch):
    """ctrlray's own actor, noting when it is up, so that start-up can be left out."""

    def __init__(self, spec: EngineSpec, sampling: config.Sampling, out: Storage, where: Where, max_restarts: int) -> None:
        super().__init__(spec, sampling, out, where, max_restarts)
        self._out.write_json(time.time(), "up.json")


def ctrlray_pass(spec: EngineSpec, prompts: list[list[int]], sampling: config.Sampling, batch: int) -> tuple[int, float]:
    """The generate stage's stream over one engine actor: files of requests in, Parquet blocks out."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Storage(scratch)
        rows = [
            {
                "response_id": f"{i:06d}",
                "prompt_id": str(i),
                "behaviour": "b",
                "sample": 0,
                "prompt_token_ids": p,
                "prefix_token_ids": [],
            }
            for i, p in enumerate(prompts)
        ]
        settings = config.Generate(sampling=sampling, batch_size=batch, pool=config.Pool(cpus=0.5), engine=spec.settings)
        blocks = generate.write_blocks(from_rows(rows, schema.REQUESTS), out, batch)
        generate.GenerateBatch, kept = TimedGenerate, generate.GenerateBatch  # type: ignore[misc]
        try:
            stream = generate.generate_stream(generate.files(blocks), out, settings, spec)
            tokens = sum(
                sum(map(len, b["token_ids"].to_pylist())) for b in stream.iter_batches(batch_size=None, batch_format="pyarrow")
            )
            ended = time.time()
        finally:
            generate.GenerateBatch = kept  # type: ignore[misc]
        return tokens, ended - float(out.read_json("up.json"))


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    quiet_ray()
    space = ControlSpace((config.Attribute(name="helpfulness", levels=3), config.Attribute(name="safety", levels=3)))
    base = models.prepare(config.Model(), space)
    renderer = base.renderer(space)
    texts = [r.messages for r in read_source(config.PackagedPrompts()) if r.messages]
    prompts = [renderer.render(with_system(texts[i % len(texts)], "Answer in one sentence.")) for i in range(options.requests)]
    dtype = models.pick_dtype("auto", gpu=False)
    spec = EngineSpec(base.folder, dtype, 1024, config.EngineSettings(), masked_ids=base.control_ids)
    sampling = config.Sampling(max_tokens=options.tokens, temperature=0.8)
    raw_sampling = {
        "max_tokens": options.tokens,
        "temperature": 0.8,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "logprobs": 0,
        "logit_bias": dict.fromkeys(base.control_ids, -100.0),
    }
    root = str(Path(__file__).parents[1])
    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    rates: dict[str, list[float]] = {"ctrlray": [], "vllm": [], "transformers": []}
    for repeat in range(options.repeats):
        order = ["ctrlray", "vllm", "transformers"]
        for name in order if repeat % 2 == 0 else order[::-1]:
            if name == "ctrlray":
                tokens, seconds = ctrlray_pass(spec, prompts, sampling, options.batch)
            else:
                actor = ray.remote(RawVLLM if name == "vllm" else Transformers).options(num_cpus=1)
                made = actor.remote(spec.arguments(), spec.environment()) if name == "vllm" else actor.remote(base.folder, dtype)
                call = (
                    made.run.remote(prompts, raw_sampling, options.batch)
                    if name == "vllm"
                    else made.run.remote(prompts, options.tokens)
                )
                tokens, seconds = ray.get(call)
                ray.kill(made)
            rates[name].append(tokens / seconds)
            print(f"{name}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", flush=True)
    figures = []
    for peer, target in (("vllm", 0.95), ("transformers", 1.0)):
        ratio, spread = middle([a / b for a, b in zip(rates["ctrlray"], rates[peer], strict=True)])
        figures.append(figure(f"ctrlray / {peer} tokens/s", f">= {target}", ratio, ratio >= target, spread))
    for name, values in rates.items():
        rate, spread = middle(values)
        figures.append(figure(f"{name} tokens/s", "reported", rate, None, spread))
    print(store("generation", figures, dtype=dtype, requests=options.requests, new_tokens=options.tokens))


if __name__ == "__main__":
    main()
