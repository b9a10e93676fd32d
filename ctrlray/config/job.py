"""The job file whole: all that a run is made of, checked across its parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ctrlray.config.base import Frozen
from ctrlray.config.generation import Generate, Prompts, PromptSource, Sampling
from ctrlray.config.model import Attribute, Control, Model
from ctrlray.config.places import Root, data_home, place
from ctrlray.config.rewards import EmbeddedReward, Reward, Score
from ctrlray.config.training import PPO, Distill, Train, Transfer


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
    def critics(self) -> dict[str, str]:
        """Models that critics start from, by the settings that name them: `train.objectives.1.critic.model`."""
        learning = [(i, o) for i, o in enumerate(self.train.objectives) if isinstance(o, PPO) and o.advantage == "gae"]
        return {f"train.objectives.{i}.critic.model": o.critic.model for i, o in learning if o.critic.model}

    def places(self, rewards: Sequence[Reward]) -> list[str]:
        """Where the job has some of its rewards, as its settings are named: `rewards.1`."""
        return [f"rewards.{self.rewards.index(r)}" for r in rewards]

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
