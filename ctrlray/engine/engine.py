"""The one vLLM engine: token ids in, sampled answers out, weights swapped in place.

It runs inside a Ray Data actor for generation and inside a persistent named actor for evaluation and reinforcement
learning; it knows nothing of Ray itself. vLLM is imported when an engine starts, because that takes 20 s.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ctrlray.adapter import check_homes, merged_tensors, tensor_names
from ctrlray.config import EngineSettings, Sampling
from ctrlray.control import MASKED_BY
from ctrlray.engine.probes import Given, Held, compare, in_network
from ctrlray.engine.transfer import Offer, Received
from ctrlray.errors import ClusterError, ConfigError

if TYPE_CHECKING:  # recipes are made where torch is not needed
    from torch import Tensor


class Completion(NamedTuple):
    """One sampled answer."""

    text: str
    token_ids: list[int]
    """With the end-of-turn token when finished."""
    logprob_sum: float
    """Nats; sum of the log-probs of all sampled tokens, those cut back included, before temperature and masks."""
    finish_reason: str
    """`stop`, `length`, or `sentence` for an answer cut back to its last complete sentence."""
    logprobs: list[float]
    """Nats, one per sampled token of `token_ids`: the end-of-turn token that a cut answer is given was not sampled.

    Before temperature and masks, or after both where the engine's recipe has `processed_logprobs`; then so is `logprob_sum`.
    """
    weights_version: int = 0
    """Of the weights that it was sampled with."""


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
    processed_logprobs: bool = False
    """Log-probs after temperature and masks, of the distribution that was sampled from, instead of the model's own."""
    log_stats: bool = False
    """Count what `Engine.cache_hits` tells."""
    transfer: str | None = None
    """The backend of vLLM's weight transfer, for engines that take weights from a trainer's GPU."""

    def environment(self) -> dict[str, str]:
        """Variables that vLLM reads when it is imported; set in the actor's process before that."""
        if self.gpus:
            # the engine is a process of its own there, and is handed functions to load weights and to read them back
            return self.device_environment() | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        return self.device_environment() | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}

    def build(self) -> Engine:
        """The engine, in this process; `environment` belongs in `os.environ` before."""
        return Engine(self)

    def device_environment(self) -> dict[str, str]:
        """Of these, what holds too where a server has put the engine into a process of its own."""
        common = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
        if self.gpus:
            return common
        cores = sorted(os.sched_getaffinity(0))
        return common | {
            # model and scheduler in one process: each more that is spawned imports vLLM again (with two, 48 s against 6 s)
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(self.settings.kv_cache_gib),
            # by default vLLM leaves a core idle, which on two cores is half of the machine
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if self.whole_machine else "auto",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }

    def arguments(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM`."""
        placed: dict[str, Any] = {"gpu_memory_utilization": self.settings.gpu_memory_utilization} if self.gpus else {}
        if self.transfer:
            placed["weight_transfer_config"] = {"backend": self.transfer}
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
            "disable_log_stats": not self.log_stats,
            "logprobs_mode": "processed_logprobs" if self.processed_logprobs else "raw_logprobs",
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
                logit_bias=dict.fromkeys(self.spec.masked_ids, -MASKED_BY) or None,
            )
            for limit in max_tokens or [sampling.max_tokens] * len(prompts)
        ]
        requests = [{"prompt_token_ids": [int(t) for t in p]} for p in prompts]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        found = [[_completion(sample, self.weights_version) for sample in output.outputs] for output in outputs]
        if sampling.finish == "model":
            return found
        return [[self._to_sentence(c) if c.finish_reason == "length" else c for c in samples] for samples in found]

    def logp(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """Nats; what the weights in force give the tokens of each answer after its context, before temperature and masks."""
        from vllm import SamplingParams

        # a token is sampled after each answer, because vLLM samples at least one
        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        requests = [{"prompt_token_ids": [int(t) for t in (*c, *a)]} for c, a in zip(contexts, answers, strict=True)]
        outputs = self._llm.generate(requests, asked, use_tqdm=False)
        return [_logp_at_end(output.prompt_logprobs, answer) for output, answer in zip(outputs, answers, strict=True)]

    def _to_sentence(self, answer: Completion) -> Completion:
        """The answer up to its last complete sentence and an end-of-turn token; as it was when no sentence is complete."""
        tokenizer = self._llm.get_tokenizer()
        for size in range(len(answer.token_ids), 0, -1):
            text = self.decode(answer.token_ids[:size])
            if ends_sentence(text):
                ids = [*answer.token_ids[:size], int(tokenizer.eos_token_id)]
                return answer._replace(text=text, token_ids=ids, finish_reason="sentence", logprobs=answer.logprobs[:size])
        return answer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._llm.get_tokenizer().decode(list(token_ids), skip_special_tokens=True))

    def load_weights(self, folder: str, version: int) -> Held:
        """Replace all weights by those of a safetensors folder, without a restart.

        Raises ConfigError unless the folder has exactly the names of the engine's own checkpoint: vLLM itself only warns.
        """
        if missing := tensor_names(self.spec.model) ^ tensor_names(folder):
            raise ConfigError(f"weights in {folder} do not match the engine's: {sorted(missing)[:3]} on one side only")
        return self._replace(folder, {}, {"control_ids": self.spec.masked_ids}, version)

    def load_adapter(self, adapter: Mapping[str, Tensor], card: Mapping[str, Any], version: int) -> Held:
        """Replace all weights by the engine's own checkpoint with an adapter merged into it, without a restart.

        Raises ConfigError when a tensor of the adapter has no home there.
        """
        check_homes(self.spec.model, adapter)
        return self._replace(self.spec.model, adapter, card, version)

    def _replace(self, folder: str, adapter: Mapping[str, Tensor], card: Mapping[str, Any], version: int) -> Held:
        begun = time.perf_counter()
        names = tensor_names(folder)
        given = Given(folder, names, card["control_ids"])
        load = partial(_reload, given=given, folder=folder, adapter=dict(adapter), card=dict(card), dtype=self.spec.dtype)
        given = self._llm.collective_rpc(load)[0]
        if unasked := names - given.seen:
            raise ClusterError(f"the engine took no new weights for {sorted(unasked)[:3]}")
        self._forget_prefixes()
        self.weights_version = version
        reload_s = time.perf_counter() - begun - given.seconds
        return Held(version, compare(given, self._sums(card["control_ids"])), given.seconds, reload_s)

    def receive_weights(self, offer: Offer, index: int) -> Received:
        """Replace all weights by those that a trainer sends meanwhile, without a restart; `index` is this engine's in its pool.

        Raises ConfigError unless the names offered are those of the engine's own checkpoint: vLLM itself only warns.
        """
        if odd := tensor_names(self.spec.model) ^ set(offer.names):
            raise ConfigError(f"the trainer's weights are not those of {self.spec.model}: {sorted(odd)[:3]} on one side only")
        begun = time.perf_counter()
        if offer.port:
            self._llm.shutdown_weight_transfer_engine()  # an older group, which has lost a member
            self._llm.init_weight_transfer_engine({"init_info": offer.joining(index)})
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": offer.contents()})
        self._llm.finish_weight_update(weight_version=str(offer.version))
        self._forget_prefixes()
        self.weights_version = int(self._llm.get_weight_version())
        seconds = time.perf_counter() - begun
        return Received(self.weights_version, self._sums(self.spec.masked_ids), seconds)

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise ClusterError("the engine kept cached prefixes of the old weights: requests were still running")

    def _sums(self, control_ids: Sequence[int]) -> list[dict[str, float]]:
        """The probes in each process of the engine."""
        found: list[dict[str, float]] = self._llm.apply_model(partial(in_network, control_ids=tuple(control_ids)))
        return found

    def cache_hits(self) -> tuple[int, int]:
        """Prompt tokens that were looked up in the prefix cache since the start, and those found; 0 without `log_stats`."""
        if not self.spec.log_stats:
            return 0, 0
        counts = {"vllm:prefix_cache_queries": 0, "vllm:prefix_cache_hits": 0}
        for metric in self._llm.get_metrics():
            if metric.name in counts:
                counts[metric.name] += int(metric.value)
        queried, hit = counts.values()
        return queried, hit


def ends_sentence(text: str) -> bool:
    """Whether text ends where a sentence does: `Go home.` and `"Why?"`, but not `1.`, `e.g.` or `Dr.`."""
    tail = text.rstrip()
    ended = re.search(r"[.!?][\"')\]]*$", tail) is not None
    return ended and not re.search(r"(^|[\s.])(\d+|[A-Za-z]|e\.g|i\.e|etc|Dr|Mr|Mrs|Ms|St|vs)\.$", tail)


def _reload(
    worker: Any, given: Given, folder: str, adapter: Mapping[str, Tensor], card: Mapping[str, Any], dtype: str
) -> Given:
    """In vLLM's own worker: load a checkpoint with an adapter merged into it, a tensor at a time."""
    worker.reload_weights(weights_iterator=given.watch(merged_tensors(folder, adapter, card, dtype)))
    return given


def _logp_at_end(steps: Sequence[Any], answer: Sequence[int]) -> float:
    """Sum of the log-probs of a prompt's last tokens."""
    last = steps[len(steps) - len(answer) :]
    return math.fsum(float(step[int(t)].logprob) for t, step in zip(answer, last, strict=True))


def _completion(sample: Any, version: int) -> Completion:
    ids = [int(t) for t in sample.token_ids]
    logprobs = [float(step[t].logprob) for t, step in zip(ids, sample.logprobs, strict=True)]
    return Completion(sample.text, ids, float(sample.cumulative_logprob or 0.0), str(sample.finish_reason), logprobs, version)
