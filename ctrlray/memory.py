"""Memory as arithmetic: what weights, caches, gradients, optimizer states and activations take on one device.

Pure: settings and the shape of a model in, GiB out. A device is a GPU, or the memory of a node that computes on processors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ctrlray import config

ENGINE_PROCESS_GIB, WORKER_PROCESS_GIB, SMALL_PROCESS_GIB = 1.5, 1.2, 0.3
"""Resident memory of a process with vLLM, with torch and DeepSpeed, and with Ray alone, before any model is loaded."""
REWARD_PROCESS_GIB = 1.0
"""Of a process with torch and the activations of a batch of answers, before any model is loaded: the embedded reward in float32
reaches 1.7 GiB with its 0.6 of weights."""
CONTEXT_GIB = 1.5
"""Assumed of a GPU for the CUDA context, its libraries and NCCL's buffers."""
ALLOCATOR_SHARE = 2.0
LOGITS_AT_ONCE = 2**23
"""Output logits of a training step that exist at the same time."""
LIVE_PARAMETERS = 10**9
"""Parameters that ZeRO-3 holds gathered at most: DeepSpeed's default of `stage3_max_live_parameters`."""
ENGINE_BATCH_TOKENS = 8192
"""Tokens that vLLM prefills at once by default, whose activations it reserves room for."""
ADAM_BYTES, MASTER_BYTES, GRADIENT_BYTES = 8, 4, 4
BYTES = {"float32": 4, "bfloat16": 2}
_GIB = 2.0**30


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory."""

    parameters: int
    layers: int
    hidden: int
    linear: int
    """Sum over the linear layers of one block of inputs + outputs: a LoRA of rank r has r times that, per block."""
    values: int = 0
    """Channels of the keys, and of the values, of one token in one block."""
    vocabulary: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Shape:
        """From a transformers config of the Llama family (Qwen, Gemma, Mistral, SmolLM): gated MLP, grouped attention.

        Raises KeyError when a size is not named.
        """
        hidden, layers, heads = settings["hidden_size"], settings["num_hidden_layers"], settings["num_attention_heads"]
        size = settings.get("head_dim") or hidden // heads
        values = (settings.get("num_key_value_heads") or heads) * size
        inner, vocabulary = settings["intermediate_size"], settings["vocab_size"]
        sides = [(hidden, heads * size), (hidden, values), (hidden, values), (heads * size, hidden)]
        sides += [(hidden, inner), (hidden, inner), (inner, hidden)]
        block = sum(a * b for a, b in sides) + 2 * hidden
        tables = vocabulary * hidden * 2  # the prepared base unties them
        return cls(layers * block + tables + hidden, layers, hidden, sum(a + b for a, b in sides), values, vocabulary)

    def cache_bytes(self, width: int) -> int:
        """Bytes of keys and values of one token, `width` bytes a value (Kwon et al. 2023, arXiv 2309.06180, section 1)."""
        return 2 * self.layers * self.values * width


def parameters_of(settings: Mapping[str, Any]) -> int:
    """Parameters by a transformers config: the Llama family's, or GPT-2's. Raises KeyError for others."""
    if "n_embd" not in settings:
        return Shape.of(settings).parameters
    hidden, layers, tables = (int(settings[k]) for k in ("n_embd", "n_layer", "vocab_size"))
    tables += int(settings["n_positions"])
    return layers * (12 * hidden * hidden + 13 * hidden) + tables * hidden + 2 * hidden


class Memory(NamedTuple):
    """What one process holds on its device, in GiB."""

    weights: float = 0.0
    cache: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    process: float = 0.0
    loading: float = 0.0
    """Weights while they load: whole, before anything is sharded."""

    @property
    def total(self) -> float:
        """The most that it holds at one time."""
        return max(self.process + sum(self[:5]), self.process + self.loading)


def width(dtype: str, *, gpu: bool) -> int:
    """Bytes of a weight. `auto` is bfloat16 on GPUs; elsewhere the node decides, and the larger answer is planned with."""
    return BYTES[("bfloat16" if gpu else "float32") if dtype == "auto" else dtype]


def engine(job: config.Job, shape: Shape) -> Memory:
    """An engine: of each of its GPUs, or of its node.

    Tensor parallelism shares weights and cache among GPUs (Shoeybi et al. 2019, arXiv 1909.08053, section 3). On a GPU the
    cache is what one answer of the longest context needs, without which vLLM does not start; the rest of
    `gpu_memory_utilization` becomes more of it. Activations: a prefill's input and MLP, 8 values per token and channel.
    On processors the logits of the longest row, in the model's width, in float32 and as log-probs: an evaluation reads how
    likely whole answers are. On a GPU they lie in what `gpu_memory_utilization` leaves free.
    """
    gpus, settings = job.generate.pool.gpus, job.generate.engine
    each, ranks = width(job.model.dtype, gpu=gpus > 0), settings.tensor_parallel
    weights = shape.parameters * each / ranks / _GIB
    if not gpus:
        logits = job.model.max_context * shape.vocabulary * (each + 8) / _GIB
        return Memory(weights, settings.kv_cache_gib, activations=logits, process=ENGINE_PROCESS_GIB)
    cache = job.model.max_context * shape.cache_bytes(each) / ranks / _GIB
    activations = 8 * ENGINE_BATCH_TOKENS * shape.hidden * each / _GIB
    return Memory(weights, cache, activations=activations, process=CONTEXT_GIB)


def engine_room(job: config.Job, shape: Shape, gpu_gib: float) -> float:
    """GiB of cache of an engine over all of its GPUs, of `gpu_gib` each."""
    held = engine(job, shape)
    given = job.generate.engine.gpu_memory_utilization * gpu_gib - (held.total - held.cache)
    return max(given, 0.0) * job.generate.engine.tensor_parallel


def engine_gpu_gib(job: config.Job, shape: Shape) -> float:
    """The smallest GPU that an engine starts on, in GiB."""
    return engine(job, shape).total / job.generate.engine.gpu_memory_utilization


def worker(job: config.Job, shape: Shape) -> Memory:
    """A training worker of a job, on its GPU or its node.

    PPO without LoRA keeps a reference, the base where it starts from another model, and a critic where one learns. A row of one
    long prompt is a micro batch, however few tokens those may have.
    """
    tokens = max(job.train.micro_batch_tokens, job.model.max_context)
    held = learner(job.train.model_copy(update={"micro_batch_tokens": tokens}), shape, job.model.dtype)
    ppo = next((o for o in job.train.objectives if isinstance(o, config.PPO)), None)
    if ppo is None:
        return held
    critic = ppo.advantage == "gae"
    if job.train.lora:  # the critic is a second adapter of the same network
        times = 2.0 if critic else 1.0
        return held._replace(gradients=held.gradients * times, optimizer=held.optimizer * times)
    copies = 1 + critic + (ppo.start != "base")
    copied = shape.parameters * width(job.model.dtype, gpu=job.train.gpus_per_worker > 0) / _GIB * copies
    return held._replace(weights=held.weights + copied, loading=held.loading * (1 + copies))


def learner(train: config.Optimization, shape: Shape, dtype: str = "auto") -> Memory:
    """A training worker's weights, gradients and optimizer states, sharded by ZeRO, and its activations.

    ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054, section 5) shards the optimizer from stage 1, gradients from 2, weights
    from 3; on a GPU the layers gathered at one time come on top. With LoRA the adapter is float32: weights 4, gradients 4,
    Adam 8 bytes a parameter. All weights on a GPU: weights 2, gradients 2, Adam and masters 12 (section 3.1 there); on
    processors weights 4, gradients 4, Adam 8.

    Activations of one micro batch by Korthikanti et al. 2022, arXiv 2205.05198, eq. 1 without its attention weights, which are
    computed again: 34 bytes per block, token and channel at 2 bytes a value; with checkpointing the blocks' inputs and one
    block's activations. Twice, because an allocator keeps what batches of other sizes left. And a chunk of logits.
    """
    gpu = train.gpus_per_worker > 0
    ranks, stage, lora = train.workers, train.zero_stage, train.lora
    each = width(dtype, gpu=gpu) if lora or gpu else 4
    trained = shape.layers * shape.linear * lora.rank if lora else shape.parameters
    weights = shape.parameters * each / (ranks if stage == 3 else 1)
    if gpu and stage == 3:
        weights += min(shape.parameters, LIVE_PARAMETERS) * each
    gradient = each if gpu and not lora else GRADIENT_BYTES
    masters = MASTER_BYTES if lora or (gpu and each == 2) else 0  # else the weights that train are float32 themselves
    sharded_masters = masters / (ranks if stage and not lora else 1)
    states = trained * (ADAM_BYTES / (ranks if stage else 1) + sharded_masters)
    gradients = trained * gradient / (ranks if stage > 1 else 1)
    if train.offload != "none":
        states, gradients = 0.0, gradients if stage < 2 else 0.0
    if train.offload == "all":
        weights -= shape.parameters * each / ranks
    per_token = 17 + shape.layers if train.activation_checkpointing else 17 * shape.layers
    activations = ALLOCATOR_SHARE * per_token * train.micro_batch_tokens * shape.hidden * each + LOGITS_AT_ONCE * (2 * each + 4)
    loading = shape.parameters * (each if lora else 4) if gpu else 0.0
    process = CONTEXT_GIB if gpu else WORKER_PROCESS_GIB
    return Memory(weights / _GIB, 0.0, gradients / _GIB, states / _GIB, activations / _GIB, process, loading / _GIB)


def worker_host_gib(job: config.Job, shape: Shape) -> float:
    """Host memory of a training worker: all of it on processors; beside a GPU the loading weights, and what is offloaded."""
    if not job.train.gpus_per_worker:
        return worker(job, shape).total
    each = 4 if job.train.lora is None else width(job.model.dtype, gpu=True)
    return WORKER_PROCESS_GIB + shape.parameters * each / _GIB + _offloaded(job.train, shape, job.model.dtype)


def _offloaded(train: config.Optimization, shape: Shape, dtype: str) -> float:
    """What DeepSpeed moves to the host, by what the GPU holds without it."""
    kept, spared = (learner(train.model_copy(update={"offload": o}), shape, dtype) for o in ("none", train.offload))
    return sum(kept[:5]) - sum(spared[:5])


def engine_host_gib(job: config.Job, shape: Shape) -> float:
    """Host memory of an engine: all of it on processors; beside GPUs a process for each, and the weights while they load."""
    if not job.generate.pool.gpus:
        return engine(job, shape).total
    ranks = job.generate.engine.tensor_parallel
    return ENGINE_PROCESS_GIB * ranks + shape.parameters * width(job.model.dtype, gpu=True) / _GIB


def reward_weights_gib(parameters: int, *, gpu: bool) -> float:
    """Weights of a reward model."""
    return parameters * width("auto", gpu=gpu) / _GIB


def preparing_gib(job: config.Job, shape: Shape) -> float:
    """Host memory in which the driver prepares the base: the weights at two bytes each, or as wide as the model asks for."""
    return WORKER_PROCESS_GIB + shape.parameters * width(job.model.dtype, gpu=True) / _GIB
