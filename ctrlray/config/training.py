"""What the pool becomes, and what is learned from it: distillation, objectives, the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctrlray.config.base import Frozen, NodeGroup
from ctrlray.config.generation import Sampling


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
