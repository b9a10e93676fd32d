"""How fast an engine, a reward actor and a training worker should be: as measured or given, else by formula.

A formula's rate is a data sheet's peak times an assumed share of it; it is for comparing plans. Measure a short run, write
its rates to a file, and plan again before money depends on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from ctrlray import config, estimate, memory
from ctrlray.clusters import GPU
from ctrlray.config import Frozen, parse, read_job
from ctrlray.memory import Shape

BANDWIDTH_SHARE, COMPUTE_SHARE = 0.5, 0.3
"""Assumed of a GPU's peaks. PaLM's training reached 0.46 of its FLOP/s (Chowdhery et al. 2022, arXiv 2204.02311, table 3)."""
FORMULA, GIVEN, TWO_CORES = "by formula", "given", "as on 2 cores"

ASSUMPTIONS = (
    f"by formula: {BANDWIDTH_SHARE:g} of a GPU's memory bandwidth and {COMPUTE_SHARE:g} of its bfloat16 FLOP/s are reached",
    "a decoding step reads all weights and the cache of all its sequences once, or multiplies 2 FLOPs per parameter and "
    "sequence, whichever takes longer (Pope et al. 2022, arXiv 2211.05102, section 2)",
    "a training token takes 6 FLOPs per parameter (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), 4 with LoRA, whose frozen "
    "weights need no gradient, and 2 more where activations are computed again; a scored token takes 2",
    "as on 2 cores: rates of SmolLM2-135M on two x86 cores, slower in proportion to a model's parameters",
    "every answer takes max_tokens and every answer is scored: amounts are upper bounds",
)


class Rates(Frozen):
    """Rates of one actor each, and what starting takes; what is not given goes by formula."""

    source: str = "assumed"
    """What they were measured on."""
    generate_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Sampled tokens of one engine, all of its GPUs together."""
    score_rows_per_s: Annotated[float, Field(gt=0)] | None = None
    """Answers of the slowest reward's single actor."""
    train_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Trained tokens of one worker, prompts and wrong pairs included."""
    start_s: Annotated[float, Field(ge=0)] = 300.0
    """From asking for a phase's nodes to its first row: machines, images, weights."""


class Rate(NamedTuple):
    """One actor's rate and where it comes from."""

    per_s: float
    basis: str


def read_rates(path: Path) -> Rates:
    """Raises ConfigError where the file is not one of rates."""
    return parse(Rates, read_job(path), where=str(path))


def decoding(job: config.Job, shape: Shape, gpu: GPU | None, given: Rates) -> Rate:
    """Sampled tokens per second of one engine on `gpu`, on processors where that is None."""
    if given.generate_tokens_per_s:
        return Rate(given.generate_tokens_per_s, GIVEN)
    if gpu is None:
        return Rate(estimate.GENERATE_TOKENS * estimate.REFERENCE_PARAMETERS / shape.parameters, TWO_CORES)
    each, ranks = memory.width(job.model.dtype, gpu=True), job.generate.engine.tensor_parallel
    length = estimate.PROMPT_TOKENS + job.generate.sampling.max_tokens
    cached = length * shape.cache_bytes(each)
    room = memory.engine_room(job, shape, gpu.memory_gib) * 2**30
    sequences = max(1, min(job.generate.engine.max_num_seqs, job.generate.batch_size, int(room / cached)))
    reading = (shape.parameters * each + sequences * cached) / (gpu.gb_per_s * 1e9 * BANDWIDTH_SHARE * ranks)
    multiplying = 2 * shape.parameters * sequences / (gpu.bf16_tflops * 1e12 * COMPUTE_SHARE * ranks)
    return Rate(sequences / max(reading, multiplying), FORMULA)


def scoring(job: config.Job, parameters: int, gpu: GPU | None, given: Rates) -> Rate:
    """Answers per second of one actor of a reward with that many parameters; 0 parameters are of a function or a server."""
    if given.score_rows_per_s:
        return Rate(given.score_rows_per_s, GIVEN)
    if gpu is None or not parameters:
        scale = max(parameters / estimate.REFERENCE_PARAMETERS, 1.0)
        return Rate(estimate.SCORE_ROWS / scale, TWO_CORES)
    length = estimate.PROMPT_TOKENS + job.generate.sampling.max_tokens
    return Rate(gpu.bf16_tflops * 1e12 * COMPUTE_SHARE / (2 * parameters * length), FORMULA)


def training(job: config.Job, shape: Shape, gpu: GPU | None, given: Rates) -> Rate:
    """Trained tokens per second of one worker."""
    if given.train_tokens_per_s:
        return Rate(given.train_tokens_per_s, GIVEN)
    if gpu is None:
        return Rate(estimate.TRAIN_TOKENS * estimate.REFERENCE_PARAMETERS / shape.parameters, TWO_CORES)
    flops = (4 if job.train.lora else 6) + (2 if job.train.activation_checkpointing else 0)
    return Rate(gpu.bf16_tflops * 1e12 * COMPUTE_SHARE / (flops * shape.parameters), FORMULA)
