"""What is served, and on what: the settings of `ctrlray serve` and of a Serve config file's `args`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctrlray.config import EngineSettings, Frozen

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What names of models look like."""


class Source(Frozen):
    """A model, or models of one run."""

    model: str
    """An exported folder, a run's name, or a path or URI of either. Every node must see a folder at the same path."""
    methods: tuple[str, ...] = ()
    """Of a run: trained objectives, and `start` for the model before training (reranked); what it exported when empty."""
    name: Annotated[str, Field(pattern=f"^{NAME}$")] | None = None
    """Name in the API, followed by `-<method>` where several methods are served; the run's or folder's name when unset."""


class Replicas(Frozen):
    """vLLM servers of each model."""

    min: Annotated[int, Field(ge=0)] = 1
    """0: none while nobody asks."""
    max: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs that one reserves in Ray."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """0: on CPU. Else GPUs of one replica, which is engine.tensor_parallel of them."""
    accelerator: str | None = None
    """Ray's name of the GPU, such as L4 or H100; any when unset."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < max(self.min, 1):
            raise ValueError(f"max={self.max} is below min={self.min}; raise max")
        return self


class Ingress(Frozen):
    """What stands before the engines."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """More than one share a desk that counts, itself one more small actor."""
    cpus: Annotated[float, Field(ge=0)] = 0.1
    waiting: Annotated[int, Field(ge=0)] = 64
    """Requests per model that may wait beyond those that its engines hold at once; more are answered 429."""
    answer_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for a whole answer, and for each next piece of a stream; then 503."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 10_000_000
    """A request body of so many bytes, or more, is refused."""
    max_held_bytes: Annotated[int, Field(ge=1024)] = 100_000_000
    """What the bodies of one key's requests may have together in one replica, from their arrival to the end of their answers."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A request body that takes longer to arrive is given up."""
    stream_interval_ms: Annotated[float, Field(ge=0)] = 100.0
    """Tokens that come within this time after a message travel in one; the first is sent at once. Many streams wait longer."""

    @model_validator(mode="after")
    def _one_fits(self) -> Ingress:
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(f"max_held_bytes={self.max_held_bytes} is less than max_body_bytes={self.max_body_bytes}; raise it")
        return self


class Scorers(Frozen):
    """Servers of each reward, where rewards are served."""

    replicas: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(ge=0)] = 0.25
    """Logical CPUs that one reserves in Ray."""
    gpus: Annotated[float, Field(ge=0)] = 0.0


class ServeSettings(Frozen):
    """Everything that a served application is made of."""

    models: Annotated[tuple[Source, ...], Field(min_length=1)]
    policy: str | None = None
    """Path of the policy file on the nodes that run the ingress; without one there is one local key."""
    rewards: bool = False
    """Serve the rewards of the first run among the models, for `control_strategy: rerank` and scores of answers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_context: Annotated[int, Field(ge=64)] | None = None
    """Longest prompt plus answer in tokens; the run's, or what the model takes, when unset."""
    drain_s: Annotated[float, Field(ge=0)] = 300.0
    """Longest wait for the answers that a replica is giving when it ends: after scaling down, a new deployment, or a stop.
    `ctrlray serve` waits 5 s unless told otherwise."""
    engine: EngineSettings = EngineSettings(max_num_seqs=64)
    replicas: Replicas = Replicas()
    ingress: Ingress = Ingress()
    scorers: Scorers = Scorers()

    @model_validator(mode="after")
    def _whole_gpus(self) -> ServeSettings:
        if self.replicas.gpus not in (0, self.engine.tensor_parallel):
            raise ValueError(
                f"replicas.gpus={self.replicas.gpus} and engine.tensor_parallel={self.engine.tensor_parallel} must be the same"
            )
        return self
