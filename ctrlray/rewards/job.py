"""The job files of `ctrlray reward train` and `ctrlray reward evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctrlray import config
from ctrlray.config import Cluster, Frozen, Model, Optimization, Pool, Reward
from ctrlray.rewards.heads import Penalties


class LabelFiles(Frozen):
    """Labels of one attribute: preference pairs or ratings, see `ctrlray.rewards.data`. `$CTRLRAY_DATA` is expanded."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """In a file of ratings also the name of the rating."""
    train: str
    valid: str
    """Rows to measure on; nothing is fitted to them."""


class Fit(Frozen):
    """Which features the heads read and what pulls on the fit; see `ctrlray.rewards.heads.Objective`."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (20, 24, 30)
    """Blocks, counted from 1. Only as many blocks run as the highest asks for."""
    positions: Annotated[tuple[Literal["last", "end", "mean"], ...], Field(min_length=1)] = ("last",)
    """last: the answer's last text token; end: the end-of-turn token; mean: average over the answer."""
    l2: Annotated[float, Field(gt=0)] = 1.0
    cross: Annotated[float, Field(ge=0)] = 0.0
    length: Annotated[float, Field(ge=0)] = 0.0
    pair_length: Annotated[float, Field(ge=0)] = 0.0
    between: Annotated[float, Field(ge=0)] = 0.0

    @property
    def penalties(self) -> Penalties:
        """The plain numbers that the fit takes."""
        return Penalties(self.l2, self.cross, self.length, self.pair_length, self.between)


class LinearHeads(Frozen):
    """The model stays frozen: one linear head per attribute on its hidden states, fitted to pairs in seconds."""

    type: Literal["heads"] = "heads"
    fit: Fit = Fit()
    trials: dict[str, Fit] = Field(default_factory=dict)
    """Other settings to fit and list in the card beside the chosen one."""
    pool: str | None = None
    """Finished answers sampled from the model, several per prompt: a job file (.yaml, relative to this one) whose
    `generate` stage samples them, or a jsonl or parquet file with `messages` and `response`.

    Without one, `between` and `length` have no effect and no correlations are reported."""
    pool_fit_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the pool's prompts that the fit sees; correlations are reported on the others."""


class NGramFit(Frozen):
    """Which n-grams count and what pulls on the fit; see `ctrlray.rewards.tfidf` and `ctrlray.rewards.heads.Objective`."""

    words: tuple[Annotated[int, Field(ge=1, le=5)], ...] = (1, 2)
    """Lengths of n-grams of words."""
    chars: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (3, 4, 5)
    """Lengths of n-grams of characters within a word."""
    min_count: Annotated[int, Field(ge=1)] = 3
    """Training answers that an n-gram must stand in to count."""
    l2: Annotated[float, Field(gt=0)] = 0.003
    cross: Annotated[float, Field(ge=0)] = 0.0
    pair_length: Annotated[float, Field(ge=0)] = 0.0

    @property
    def penalties(self) -> Penalties:
        """The plain numbers that the fit takes; those that need a pool of answers are 0."""
        return Penalties(self.l2, self.cross, 0.0, self.pair_length, 0.0)

    @model_validator(mode="after")
    def _some(self) -> NGramFit:
        if not self.words and not self.chars:
            raise ValueError("words and chars are both empty, so no n-gram counts; name a length in one of them")
        return self


class LinearTfidf(Frozen):
    """No network at all: one linear head per attribute on TF-IDF n-grams of the answer, fitted to pairs in seconds."""

    type: Literal["tfidf"] = "tfidf"
    fit: NGramFit = NGramFit()
    trials: dict[str, NGramFit] = Field(default_factory=dict)
    """Other settings to fit and list in the card beside the chosen one."""
    folds: Annotated[int, Field(ge=2)] = 4
    """Parts of the training rows, by first human turn, that take turns at being held out: how settings are compared."""


class FineTune(Optimization):
    """LoRA or full fine-tuning of a sequence classifier with one logit per attribute.

    What a file holds decides its loss: pairs are learned by Bradley-Terry, ratings by regression; see
    `ctrlray.objectives.reward`. A causal language model gets a score head that starts at zero.
    """

    type: Literal["finetune"] = "finetune"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """More than one often overfits preferences."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Pairs or rated answers per optimizer step, over all workers."""
    micro_batch_tokens: Annotated[int, Field(ge=64)] = 2048
    """Most padded tokens in one forward pass of one worker; a longer pair passes alone."""
    margin: Annotated[float, Field(ge=0)] | Literal["rows"] = 0.0
    """The gap, in log-odds, that chosen must keep before rejected: one number, or `rows`: each row's own `margin`."""
    eval_every: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps between measurements on held-out rows, and between snapshots to resume from."""
    eval_rows: Annotated[int, Field(ge=1)] = 128
    """Held-out rows in those measurements; the card is measured on all."""


Method = Annotated[LinearHeads | LinearTfidf | FineTune, Field(discriminator="type")]


class RewardTrainJob(Frozen):
    """Everything that a reward is made of."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the heads file or the model folder, and of its card."""
    out: str | None = None
    """Absolute folder for them; the user's data directory when unset. Several workers must all reach it."""
    seed: int = 0
    model: Model = Model()
    """What is built on: frozen under heads; a causal model or a sequence classifier to be fine-tuned; unused by tfidf."""
    attributes: Annotated[tuple[LabelFiles, ...], Field(min_length=1)]
    method: Method = LinearHeads()
    reserve_judge_half: bool = True
    """Leave out the training rows that belong to held-out judges: half of them, by first human turn."""
    judge: bool = False
    """Make a held-out judge: learn from the half that `reserve_judge_half` leaves out, and from no other row."""
    max_pairs: Annotated[int, Field(ge=4)] | None = None
    """Pairs or ratings per file; for trials."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Longer dialogues lose their beginning."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Answers per call of an actor, when features are extracted and when held-out rows are scored."""
    actors: Pool = Pool(max_size=2)
    """Who extracts features and scores held-out rows."""
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _consistent(self) -> RewardTrainJob:
        names = [a.name for a in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"attribute names must differ, got {names}")
        if self.out is not None and not Path(self.out).expanduser().is_absolute():
            raise ValueError(f"out={self.out!r} is relative; give an absolute path")
        return self

    @property
    def folder(self) -> Path:
        """Where results are written."""
        if self.out:
            return Path(self.out).expanduser()
        return config.data_home() / ("rewards" if self.method.type == "finetune" else "heads")


class LabelledSource(Frozen):
    """Labels to hold a reward against. `$CTRLRAY_DATA` is expanded."""

    name: Annotated[str, Field(min_length=1)]
    path: str
    attribute: str | None = None
    """The output of the reward that the labels are about. Unset: its only output; for ratings, every output that is rated."""


class RewardEvaluateJob(Frozen):
    """A reward, and labels to hold it against."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the card's files."""
    out: str | None = None
    """Absolute folder for the card; the user's data directory when unset."""
    reward: Reward
    """As in the `rewards` of a run's job file."""
    sources: Annotated[tuple[LabelledSource, ...], Field(min_length=1)]
    max_rows: Annotated[int, Field(ge=2)] | None = None
    """Per source; for trials."""
    bins: Annotated[int, Field(ge=1, le=50)] = 5
    """Of the calibration curve, from 0.5 to 1."""
    seed: int = 0
    """Of the bootstrap intervals."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Answers per call of an actor."""
    actors: Pool = Pool()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _consistent(self) -> RewardEvaluateJob:
        names = [s.name for s in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: names must differ, got {names}")
        if self.out is not None and not Path(self.out).expanduser().is_absolute():
            raise ValueError(f"out={self.out!r} is relative; give an absolute path")
        return self

    @property
    def folder(self) -> Path:
        """Where the card is written."""
        return Path(self.out).expanduser() if self.out else config.data_home() / "reward_cards"
