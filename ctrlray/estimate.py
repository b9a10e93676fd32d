"""How many tokens and minutes each stage of a job should take: arithmetic for `--dry-run`, stated with its assumptions."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from ctrlray import config

# Rates of SmolLM2-135M on two x86 cores, in tokens or rows per second; other models scale by their parameters.
REFERENCE_PARAMETERS = 135e6
GENERATE_TOKENS = 200.0
SCORE_ROWS = 10.0
TRAIN_TOKENS = 250.0
ENGINE_START_S = 30.0
FORWARD_SHARE = 1 / 3
"""Of a training pass that its forward half takes."""
PROMPT_TOKENS = 60
"""Assumed length of a rendered prompt."""
ASSUMED_PROMPTS = 100
"""Of a source of a prompt set whose size is not told by its settings."""
_SIZES = {"packaged": 256, "mt_bench": 80, "jailbreakbench": 100, "xstest": 450}


class Estimate(NamedTuple):
    """One stage: rows, tokens at most, and minutes on a two-core machine (None where GPUs are asked for)."""

    stage: str
    rows: int
    tokens: int
    minutes: float | None


class Reinforced(NamedTuple):
    """Amounts of reinforcement learning: answers, their tokens, tokens that are trained on, and passes over those."""

    rollouts: int
    sampled: int
    trained: int
    passes: float
    """A forward pass for the log-probs of the policy and one for the reference's count by their share of a training pass."""


def reinforced(ppo: config.PPO) -> Reinforced:
    """Upper bounds: every answer takes max_tokens."""
    rollouts = ppo.steps * ppo.rollouts_per_step
    sampled = rollouts * ppo.sampling.max_tokens
    trained = sampled + rollouts // (ppo.settings_per_prompt * ppo.group_size) * PROMPT_TOKENS
    return Reinforced(rollouts, sampled, trained, ppo.epochs + FORWARD_SHARE * 2)


def _size(wanted: config.PromptSet) -> int:
    """Prompts of a set at most, as far as its settings tell."""
    known = [getattr(s, "limit", None) or _SIZES.get(getattr(s, "name", s.type), ASSUMED_PROMPTS) for s in wanted.sources]
    return min(wanted.limit or sum(known), sum(known))


def estimate(job: config.Job, parameters: float = REFERENCE_PARAMETERS) -> list[Estimate]:
    """Upper bounds: every answer takes max_tokens, every example survives to max_examples."""
    scale = parameters / REFERENCE_PARAMETERS
    on_gpu = job.generate.pool.gpus > 0 or job.train.gpus_per_worker > 0
    answers = job.prompts.train * job.generate.samples
    sampled = answers * job.generate.sampling.max_tokens
    cells = prod(len(v) for v in job.evaluate.levels) if job.evaluate.levels else prod(a.levels for a in job.control.attributes)
    methods = job.evaluate.methods
    candidates = job.evaluate.candidates if "reranking" in methods else 0  # which serve all cells, as the start model's do
    told = cells * (len(job.train.objectives) + ("prompting" in methods)) + ("start" in methods)
    asked = job.prompts.eval + sum(_size(s) for s in job.evaluate.sets)
    graded = asked * (job.evaluate.samples * told + candidates)
    said = asked * candidates * job.generate.sampling.max_tokens
    said += (graded - asked * candidates) * job.evaluate.sampling.max_tokens
    examples = min(job.distill.max_examples, answers)
    branches = 1 + job.distill.counterfactuals
    length = PROMPT_TOKENS + branches * job.generate.sampling.max_tokens
    likelihoods = [o for o in job.train.objectives if not isinstance(o, config.PPO)]
    trained = int(examples * length * job.train.epochs) * len(likelihoods)
    seconds = 30 + trained / TRAIN_TOKENS * scale
    for ppo in (o for o in job.train.objectives if isinstance(o, config.PPO)):
        r = reinforced(ppo)
        trained += r.trained
        work = (r.sampled / GENERATE_TOKENS + r.trained * r.passes / TRAIN_TOKENS) * scale
        seconds += ENGINE_START_S + work + r.rollouts / SCORE_ROWS
    rows = [
        ("prompts", job.prompts.train + job.prompts.eval, 0, 1.0),
        ("generate", answers, sampled, ENGINE_START_S + sampled / GENERATE_TOKENS * scale),
        ("score", answers, 0, answers / SCORE_ROWS * scale),
        ("distill", examples, 0, 1.0),
        ("train", examples, trained, seconds),
        ("evaluate", graded, said, ENGINE_START_S + said / GENERATE_TOKENS * scale + graded / SCORE_ROWS * scale),
    ]
    return [Estimate(stage, n, t, None if on_gpu else s / 60) for stage, n, t, s in rows]
