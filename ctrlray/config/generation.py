"""Prompts, and how answers are sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ctrlray.config.base import Frozen, Pool


class PackagedPrompts(Frozen):
    """The 256 prompts that ship with ctrlray: half everyday requests, half safety-sensitive ones."""

    type: Literal["packaged"] = "packaged"


class FilePrompts(Frozen):
    """Prompts from a file: jsonl, json, csv or parquet, also with .gz, told by its ending. `$CTRLRAY_DATA` is expanded."""

    type: Literal["file"] = "file"
    path: str
    column: str | None = None
    """Of the prompt's text or messages; by default the first of messages, prompt, question, instruction, text, turns."""
    limit: Annotated[int, Field(ge=1)] | None = None


class HHPrompts(Frozen):
    """Anthropic HH's native dialogues: the prompt is all turns but the last answer. `$CTRLRAY_DATA` is expanded."""

    type: Literal["hh"] = "hh"
    path: str
    limit: Annotated[int, Field(ge=1)] | None = None


class HubPrompts(Frozen):
    """A Hugging Face data set by name."""

    type: Literal["hub"] = "hub"
    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class BenchmarkPrompts(Frozen):
    """A published set: its file in `$CTRLRAY_DATA/prompts` where there is one, else its Hugging Face data set.

    mt_bench (benign, arXiv 2306.05685): mt_bench_80.jsonl, or HuggingFaceH4/mt_bench_prompts. jailbreakbench (harmful, arXiv
    2404.01318): jailbreakbench_100.json, or JailbreakBench/JBB-Behaviors. xstest (safe prompts that look harmful and harmful
    ones beside them, labelled, arXiv 2308.01263): xstest_prompts.csv, or Paul/XSTest.
    """

    type: Literal["benchmark"] = "benchmark"
    name: Literal["mt_bench", "jailbreakbench", "xstest"]
    limit: Annotated[int, Field(ge=1)] | None = None


PromptSource = Annotated[
    PackagedPrompts | FilePrompts | HHPrompts | HubPrompts | BenchmarkPrompts, Field(discriminator="type")
]


class Prompts(Frozen):
    """Where prompts come from and how many are used."""

    sources: tuple[PromptSource, ...] = (PackagedPrompts(),)
    train: Annotated[int, Field(ge=1)] = 96
    """Prompts that answers are sampled for. Dialogues that share their first human turn stay in one split."""
    eval: Annotated[int, Field(ge=1)] = 16
    """Held-out prompts for the evaluation grid."""


class Behaviour(Frozen):
    """A system instruction that widens the coverage of the control space while sampling; training never sees it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}$")]
    system: str | None = None
    """Replaces the conversation's system turn; null samples the plain prompt."""
    prefix: str = ""
    """Opens the answer, which the model then continues: reaches answers that a small model would not begin by itself."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Lower than sampling.max_tokens; with `finish: sentence` it makes short answers of a model that rambles."""


class Sampling(Frozen):
    """How one answer is sampled."""

    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 it halved vLLM's speed on a CPU where that was measured; min_p did not, so prefer that there."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Tokens less likely than this share of the likeliest one are left out."""
    finish: Literal["model", "sentence"] = "model"
    """`sentence`: an answer cut off at max_tokens is cut back to its last complete sentence and counts as finished."""


class EngineSettings(Frozen):
    """Arguments of the vLLM engine."""

    max_num_seqs: Annotated[int, Field(ge=1)] = 128
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """GPUs per engine."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 1
    """KV cache on CPU; GPUs use `gpu_memory_utilization`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    compile: bool | None = None
    """torch.compile: on a CPU some 10% more tokens/s for a start-up of over a minute more. Unset: on GPUs only."""
    block_size: Annotated[int, Field(ge=8)] = 32
    """KV cache block in tokens; small enough that prompts share cached prefixes."""


class Generate(Frozen):
    """Sampling of the model's own answers."""

    samples: Annotated[int, Field(ge=1)] = 6
    """Answers per prompt, dealt over the behaviours in order."""
    behaviours: Annotated[tuple[Behaviour, ...], Field(min_length=1)] = (Behaviour(name="plain"),)
    sampling: Sampling = Sampling()
    batch_size: Annotated[int, Field(ge=1)] = 96
    """Requests an engine holds at once; a block written to storage is one batch."""
    pool: Pool = Pool(cpus=0.5)
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _within_limit(self) -> Generate:
        for b in self.behaviours:
            if b.max_tokens and b.max_tokens > self.sampling.max_tokens:
                raise ValueError(
                    f"generate.behaviours: max_tokens={b.max_tokens} of {b.name!r} is above sampling.max_tokens="
                    f"{self.sampling.max_tokens}; raise that one"
                )
        return self

    @field_validator("behaviours")
    @classmethod
    def _names_differ(cls, value: tuple[Behaviour, ...]) -> tuple[Behaviour, ...]:
        names = [b.name for b in value]
        if len(set(names)) < len(names):
            raise ValueError(f"behaviour names must differ, got {names}")
        return value
