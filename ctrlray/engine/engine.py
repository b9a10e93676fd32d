"""The one vLLM engine: token ids in, sampled answers out, weights swapped in place.

It runs inside a Ray Data actor for generation and inside a persistent named actor for evaluation and reinforcement
learning; it knows nothing of Ray itself. vLLM is imported when an engine starts, because that takes 20 s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ctrlray.config import EngineSettings, Sampling
from ctrlray.errors import ClusterError, ConfigError


class Completion(NamedTuple):
    """One sampled answer."""

    text: str
    token_ids: list[int]
    """With the end-of-turn token when finished."""
    logprob_sum: float
    """Nats; sum of the log-probs of all sampled tokens, those cut back included, before temperature and masks."""
    finish_reason: str
    """`stop`, `length`, or `sentence` for an answer cut back to its last complete sentence."""


@dataclass(frozen=True)
class EngineSpec:
    """Recipe of an engine: small and picklable; the engine is built where it runs."""

    model: str
    dtype: str
    max_context: int
    settings: EngineSettings
    gpus: float = 0.0
    seed: int = 0
    masked_ids: tuple[int, ...] = field(default=())
    """Token ids that are never sampled: the control tokens."""
    whole_machine: bool = True
    """The only engine of its node, so on CPU it may bind every core."""

    def environment(self) -> dict[str, str]:
        """Variables that vLLM reads when it is imported; set in the actor's process before that."""
        common = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
        if self.gpus:
            return common
        cores = sorted(os.sched_getaffinity(0))
        return common | {
            # in one process: the default spawns two more, and each imports vLLM again (48 s against 6 s)
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
            "VLLM_CPU_KVCACHE_SPACE": str(self.settings.kv_cache_gib),
            # by default vLLM leaves a core idle, which on two cores is half of the machine
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if self.whole_machine else "auto",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }

    def arguments(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM`."""
        placed = {"gpu_memory_utilization": self.settings.gpu_memory_utilization} if self.gpus else {}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_context,
            "max_num_seqs": self.settings.max_num_seqs,
            "block_size": self.settings.block_size,
            "tensor_parallel_size": self.settings.tensor_parallel,
            "enable_prefix_caching": True,
            "enforce_eager": not (self.settings.compile if self.settings.compile is not None else self.gpus > 0),
            "seed": self.seed,
            "disable_log_stats": True,
            **placed,
        }


class Engine:
    """A vLLM engine with versioned weights. Call `EngineSpec.environment` into `os.environ` before building one."""

    def __init__(self, spec: EngineSpec) -> None:
        from vllm import LLM

        self.spec = spec
        self.weights_version = 0
        self._llm = LLM(**spec.arguments())

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, max_tokens: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Sample `n` answers for each prompt of token ids, in the prompts' order; `max_tokens` has a limit for each prompt."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=n,
                max_tokens=limit,
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature else 1.0,
                min_p=sampling.min_p if sampling.temperature else 0.0,
                logprobs=0,
                logit_bias=dict.fromkeys(self.spec.masked_ids, -100.0) or None,
            )
            for limit in max_tokens or [sampling.max_tokens] * len(prompts)
        ]
        requests = [{"prompt_token_ids": [int(t) for t in p]} for p in prompts]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        found = [[_completion(sample) for sample in output.outputs] for output in outputs]
        if sampling.finish == "model":
            return found
        return [[self._to_sentence(c) if c.finish_reason == "length" else c for c in samples] for samples in found]

    def _to_sentence(self, answer: Completion) -> Completion:
        """The answer up to its last complete sentence and an end-of-turn token; as it was when no sentence is complete."""
        tokenizer = self._llm.get_tokenizer()
        for size in range(len(answer.token_ids), 0, -1):
            text = self.decode(answer.token_ids[:size])
            if ends_sentence(text):
                ids = [*answer.token_ids[:size], int(tokenizer.eos_token_id)]
                return Completion(text, ids, answer.logprob_sum, "sentence")
        return answer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._llm.get_tokenizer().decode(list(token_ids), skip_special_tokens=True))

    def load_weights(self, folder: str, version: int) -> None:
        """Replace all weights by those of a safetensors folder, without a restart.

        Raises ConfigError unless the folder has exactly the names of the engine's own checkpoint: vLLM itself only warns.
        """
        missing = tensor_names(self.spec.model) ^ tensor_names(folder)
        if missing:
            raise ConfigError(f"weights in {folder} do not match the engine's: {sorted(missing)[:3]} on one side only")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self._llm.reset_prefix_cache():
            raise ClusterError("the engine kept cached prefixes of the old weights: requests were still running")
        self.weights_version = version

    def checksum(self) -> dict[str, float]:
        """Sums of probe tensors, to compare engines that should hold the same weights."""
        return dict(self._llm.apply_model(_probe)[0])


def ends_sentence(text: str) -> bool:
    """Whether text ends where a sentence does: `Go home.` and `"Why?"`, but not `1.`, `e.g.` or `Dr.`."""
    tail = text.rstrip()
    ended = re.search(r"[.!?][\"')\]]*$", tail) is not None
    return ended and not re.search(r"(^|[\s.])(\d+|[A-Za-z]|e\.g|i\.e|etc|Dr|Mr|Mrs|Ms|St|vs)\.$", tail)


def tensor_names(folder: str) -> set[str]:
    """Names of all tensors in a safetensors folder."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            names |= set(tensors.keys())
    return names


def _completion(sample: Any) -> Completion:
    total = float(sample.cumulative_logprob or 0.0)
    return Completion(sample.text, [int(t) for t in sample.token_ids], total, str(sample.finish_reason))


def _probe(network: Any) -> dict[str, float]:
    """First and last fused qkv, and the embedding: LoRA and control rows both show in these."""
    chosen: dict[str, float] = {}
    for name, value in network.named_parameters():
        if "embed_tokens" in name or "qkv_proj" in name:
            chosen[name] = float(value.double().sum())
    names = sorted(chosen)
    return {n: chosen[n] for n in {names[0], names[-1], *(n for n in names if "embed" in n)}} if names else {}
