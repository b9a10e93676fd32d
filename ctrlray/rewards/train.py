"""Making reward heads: preference pairs in, features by Ray Data, a joint fit, and heads with a card out.

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
from typing import Any

import numpy as np
import pyarrow as pa

from ctrlray import config, models
from ctrlray.errors import ConfigError, DataError
from ctrlray.ledger import Progress, Silent
from ctrlray.patience import Patience
from ctrlray.placement import on_nodes
from ctrlray.rewards import measure
from ctrlray.rewards.data import preference_pairs, read_parts
from ctrlray.rewards.heads import Answers, Floats, Heads, Ints, Preferences, fit_heads
from ctrlray.rewards.job import Fit, RewardTrainJob
from ctrlray.schema import MESSAGES, Message, digest, prompt_id

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
    method = job.method
    if method.type != "heads":
        raise ConfigError(f"method.type={method.type!r}: `train_heads` fits heads; call `finetune` for this job")
    labels = read_parts(job)
    pairs = preference_pairs(labels)
    rows = [_Row(part, p.messages, text) for part, ps in pairs.items() for p in ps for text in (p.chosen, p.rejected)]
    rows += [_Row("pool", tuple(m), r) for m, r in pool]
    every = [method.fit, *method.trials.values()]
    layers = sorted({k for f in every for k in f.layers})
    positions = sorted({p for f in every for p in f.positions})
    fingerprint = models.fingerprint(folder)
    features, lengths = cached_features(job, folder, fingerprint, rows, layers, positions, progress or Silent())
    parts = np.array([r.part for r in rows])
    groups = _group_numbers([m for m, _ in pool])
    seen = np.array([_share(prompt_id(m)) < method.pool_fit_share for m, _ in pool], bool)

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

    heads, measured = run(method.fit)
    card = {
        "name": job.name,
        "model": {"name": job.model.name, "fingerprint": fingerprint},
        "data": {
            "pairs": {part: len(ps) for part, ps in pairs.items()},
            "dropped": {part: dict(found.dropped) for part, found in labels.items()},
            "judge": job.judge,
            "judge_half_reserved": job.reserve_judge_half,
            "pool": {"answers": len(pool), "prompts": len(set(groups)), "fit_prompts": len(set(groups[seen]))},
        },
        "fit": method.fit.model_dump(mode="json"),
        "measured": measured,
        "trials": {name: {"fit": f.model_dump(mode="json"), "measured": run(f)[1]} for name, f in method.trials.items()},
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
        resources=on_nodes(job.actors.nodes),
        max_restarts=job.actors.max_restarts,
    )
    progress.total(len(rows))
    features: Floats | None = None
    lengths = np.full(len(rows), np.nan)
    patience = Patience("reward train", job.cluster.stall_timeout_s, lambda: "actors that read answers, by `ray status`")
    for batch in patience.each(done.iter_batches(batch_size=None, batch_format="numpy")):
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
        raise DataError(f"method.pool={path!r}: no such file; give a job file (.yaml) that samples one, or unset it")
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(file).to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        finished = [r for r in rows if r.get("finish_reason", "stop") == "stop" and r["response"].strip()]
        return [(r["messages"], r["response"]) for r in finished]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"method.pool={path!r}: rows need `messages` and `response` ({error!r})") from error


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
