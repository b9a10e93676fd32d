"""Making reward heads: HH files in, features by Ray Data, a joint fit, and heads with a card out.

    pairs ─┐
           ├─► features (Ray Data actor pool) ─► fit_heads ─► heads.safetensors
    pool ──┘                                        └─► measures on held-out rows ─► heads.json, heads.md

The reward sees one half of the training dialogues, by first human turn; the other half is kept for held-out judges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from ctrlray import config, models
from ctrlray.config import Cluster, Frozen, Model, Pool
from ctrlray.errors import DataError
from ctrlray.hh import Pair, judge_half, read_pairs
from ctrlray.ledger import Progress, Silent
from ctrlray.rewards import measure
from ctrlray.rewards.heads import Answers, Floats, Heads, Ints, Penalties, Preferences, fit_heads
from ctrlray.schema import MESSAGES, Message, digest, first_human_turn, prompt_id


class PairFiles(Frozen):
    """Preferences for one attribute, as Anthropic HH's native jsonl or jsonl.gz. `$CTRLRAY_DATA` is expanded."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
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


class RewardTrainJob(Frozen):
    """Everything that a set of reward heads is made of."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """File name of the heads and their card."""
    out: str | None = None
    """Absolute folder for them; the user's data directory when unset."""
    model: Model = Model()
    """The frozen backbone."""
    attributes: Annotated[tuple[PairFiles, ...], Field(min_length=1)]
    reserve_judge_half: bool = True
    """Leave out the training pairs that belong to held-out judges."""
    max_pairs: Annotated[int, Field(ge=4)] | None = None
    """Per file; for trials."""
    pool: str | None = None
    """Finished answers sampled from the model, several per prompt: a job file (.yaml, relative to this one) whose
    `generate` stage samples them, or a jsonl or parquet file with `messages` and `response`.

    Without one, `between` and `length` have no effect and no correlations are reported."""
    pool_fit_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the pool's prompts that the fit sees; correlations are reported on the others."""
    fit: Fit = Fit()
    trials: dict[str, Fit] = Field(default_factory=dict)
    """Other settings to fit and list in the card beside the chosen one."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Longer dialogues lose their beginning."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    actors: Pool = Pool(max_size=2)
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
        """Where heads and card are written."""
        return Path(self.out).expanduser() if self.out else config.data_home() / "heads"


PoolRow = tuple[list[Message], str]
"""A plain prompt and one finished answer of the model's own."""


@dataclass(frozen=True)
class _Row:
    """One answer to be turned into features."""

    part: str  # train/<attribute>, valid/<attribute> or pool
    messages: tuple[Message, ...]
    response: str


class AddFeatures:
    """Adds `features` and `length` to a batch of answers. One per actor, so the model is built where it will live."""

    def __init__(self, folder: str, layers: Sequence[int], positions: Sequence[Any], dtype: str, max_tokens: int) -> None:
        from ctrlray.rewards.features import FeatureExtractor

        self.extract = FeatureExtractor(folder, layers=layers, positions=positions, dtype=dtype, max_tokens=max_tokens)

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        """`features` float32 [B, F]; `length` [B], natural log of the answer's tokens."""
        responses = batch["response"].to_pylist()
        tokens = [self.extract.num_answer_tokens(r) for r in responses]
        features = self.extract(batch["messages"].to_pylist(), responses)
        return {"row": batch["row"].to_numpy(), "features": features, "length": np.log(np.maximum(tokens, 1))}


def train_heads(
    job: RewardTrainJob, pool: Sequence[PoolRow] = (), folder: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Make heads and card as `job` says, from the model in `folder` (resolved from `job.model` when unset).

    `pool` holds the unlabelled answers, see `read_pool`. Uses the running Ray, or starts one. Writes <name>.safetensors,
    .json and .md into `job.folder`; returns the card.
    """
    folder = models.resolve(job.model) if folder is None else folder
    pairs, dropped = _read_all(job)
    rows = [_Row(part, p.messages, text) for part, ps in pairs.items() for p in ps for text in (p.chosen, p.rejected)]
    rows += [_Row("pool", tuple(m), r) for m, r in pool]
    every = [job.fit, *job.trials.values()]
    layers = sorted({k for f in every for k in f.layers})
    positions = sorted({p for f in every for p in f.positions})
    fingerprint = models.fingerprint(folder)
    features, lengths = cached_features(job, folder, fingerprint, rows, layers, positions, progress or Silent())
    parts = np.array([r.part for r in rows])
    groups = _group_numbers([m for m, _ in pool])
    seen = np.array([_share(prompt_id(m)) < job.pool_fit_share for m, _ in pool], bool)

    def run(fit: Fit) -> tuple[Heads, dict[str, Any]]:
        columns = _columns(fit, layers, positions, features.shape[1])
        chosen = features[:, columns]
        preferences = {a.name: _preferences(chosen, lengths, parts == f"train/{a.name}") for a in job.attributes}
        valid = {a.name: _preferences(chosen, lengths, parts == f"valid/{a.name}") for a in job.attributes}
        answers = Answers(chosen[parts == "pool"], groups, lengths[parts == "pool"])
        heads = fit_heads(
            preferences,
            _take(answers, seen) if seen.any() else None,
            fit.penalties,
            layers=fit.layers,
            positions=fit.positions,
            fingerprint=fingerprint,
        )
        return heads, measure.report(heads, preferences, valid, _take(answers, ~seen), seed=0)

    heads, measured = run(job.fit)
    card = {
        "name": job.name,
        "model": {"name": job.model.name, "fingerprint": fingerprint},
        "data": {
            "pairs": {part: len(ps) for part, ps in pairs.items()},
            "dropped": dropped,
            "judge_half_reserved": job.reserve_judge_half,
            "pool": {"answers": len(pool), "prompts": len(set(groups)), "fit_prompts": len(set(groups[seen]))},
        },
        "fit": job.fit.model_dump(mode="json"),
        "measured": measured,
        "trials": {name: {"fit": f.model_dump(mode="json"), "measured": run(f)[1]} for name, f in job.trials.items()},
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    heads.save(job.folder / f"{job.name}.safetensors")
    (job.folder / f"{job.name}.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (job.folder / f"{job.name}.md").write_text(measure.card_text(card), encoding="utf-8")
    return card


def cached_features(
    job: RewardTrainJob,
    folder: Path,
    fingerprint: str,
    rows: Sequence[_Row],
    layers: Sequence[int],
    positions: Sequence[str],
    progress: Progress,
) -> tuple[Floats, Floats]:
    """As `extract`, kept in the user's cache: fits are seconds, features many minutes."""
    from safetensors.numpy import load_file, save_file

    dtype = models.pick_dtype(job.model.dtype, gpu=job.actors.gpus > 0)
    answers = [(r.messages, r.response) for r in rows]
    key = digest("features", fingerprint, dtype, job.max_tokens, list(layers), list(positions), answers)
    path = config.cache_home() / "features" / f"{key}.safetensors"
    if path.is_file():
        kept = load_file(path)
        return kept["features"], kept["lengths"]
    features, lengths = extract(job, folder, rows, layers, positions, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_file({"features": features, "lengths": lengths}, partial)
    partial.replace(path)
    return features, lengths


def extract(
    job: RewardTrainJob,
    folder: Path,
    rows: Sequence[_Row],
    layers: Sequence[int],
    positions: Sequence[str],
    progress: Progress,
) -> tuple[Floats, Floats]:
    """Features [N, F] and log lengths [N] of all rows, in their order, by an actor pool under Ray Data."""
    import ray

    # Neighbours in length share a batch and so waste little padding.
    order = sorted(range(len(rows)), key=lambda i: sum(len(m["content"]) for m in rows[i].messages) + len(rows[i].response))
    blocks = [
        pa.table(
            {
                "row": pa.array(ids, pa.int64()),
                "messages": pa.array([[dict(m) for m in rows[i].messages] for i in ids], MESSAGES),
                "response": pa.array([rows[i].response for i in ids], pa.string()),
            }
        )
        for ids in (order[i : i + job.batch_size] for i in range(0, len(order), job.batch_size))
    ]
    # The blocks are in the object store already: nothing but the actors asks for a CPU, so none can wait for another.
    done = ray.data.from_arrow(blocks).map_batches(
        AddFeatures,
        fn_constructor_args=(str(folder.resolve()), tuple(layers), tuple(positions), job.model.dtype, job.max_tokens),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=job.actors.min_size, max_size=job.actors.max_size),
        num_cpus=job.actors.cpus,
        num_gpus=job.actors.gpus,
        max_restarts=job.actors.max_restarts,
    )
    progress.total(len(rows))
    features: Floats | None = None
    lengths = np.full(len(rows), np.nan)
    for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
        if features is None:
            features = np.empty((len(rows), batch["features"].shape[1]), np.float32)
        features[batch["row"]], lengths[batch["row"]] = batch["features"], batch["length"]
        progress.advance(len(batch["row"]))
    if features is None or np.isnan(lengths).any():
        raise DataError(f"features are missing for {int(np.isnan(lengths).sum())} of {len(rows)} answers")
    return features, lengths


def read_pool(path: str) -> list[PoolRow]:
    """(messages, response) of a jsonl or parquet file. Rows that carry a finish_reason other than `stop` are left out."""
    file = Path(os.path.expandvars(path)).expanduser()
    if not file.is_file():
        raise DataError(f"pool={path!r}: no such file; give a job file (.yaml) that samples one, or unset it")
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(file).to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        finished = [r for r in rows if r.get("finish_reason", "stop") == "stop" and r["response"].strip()]
        return [(r["messages"], r["response"]) for r in finished]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"pool={path!r}: rows need `messages` and `response` ({error!r})") from error


def _read_all(job: RewardTrainJob) -> tuple[dict[str, list[Pair]], dict[str, dict[str, int]]]:
    pairs: dict[str, list[Pair]] = {}
    dropped: dict[str, dict[str, int]] = {}
    for a in job.attributes:
        for split, path in (("train", a.train), ("valid", a.valid)):
            part = f"{split}/{a.name}"
            found, dropped[part] = read_pairs(path)
            if split == "train" and job.reserve_judge_half:
                kept = [p for p in found if not judge_half(first_human_turn(p.messages))]
                dropped[part]["kept for the judge"] = len(found) - len(kept)
                found = kept
            pairs[part] = found[: job.max_pairs]
            if len(pairs[part]) < 2:
                raise DataError(f"attributes.{a.name}.{split}={path!r}: {len(pairs[part])} usable pairs; at least 2 are needed")
    return pairs, dropped


def _preferences(features: Floats, lengths: Floats, rows: Any) -> Preferences:
    """Rows come chosen, rejected, chosen, rejected, ..."""
    x, n = features[rows], lengths[rows]
    return Preferences(x[0::2], x[1::2], n[0::2] - n[1::2])


def _take(answers: Answers, rows: Any) -> Answers:
    return Answers(answers.features[rows], answers.prompt[rows], answers.length[rows])


def _group_numbers(conversations: Sequence[Sequence[Message]]) -> Ints:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt_id(m), len(numbers)) for m in conversations], np.int64)


def _share(key: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int(key[:8], 16) / 16**8


def _columns(fit: Fit, layers: Sequence[int], positions: Sequence[str], total: int) -> Ints:
    """Columns of the extracted features that `fit` reads, in the order a FeatureExtractor of its own would give."""
    width = total // (len(layers) * len(positions))
    starts = [(layers.index(k) * len(positions) + positions.index(p)) * width for k in fit.layers for p in fit.positions]
    return np.concatenate([np.arange(s, s + width) for s in starts])


