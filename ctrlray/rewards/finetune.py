"""Fine-tuning a reward model: labels in, one sequence-classification folder with its card out.

    labels ─► token ids ─► labels table ─┐
                                         ├─► learner (Ray Train, DeepSpeed) ─► merge ─► <out>/<name> ─► evaluate ─► card
    model ─► classifier with a zero head ┘

What training needs lies in `<out>/.<name>/<key>` until the folder is there; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ctrlray import models, schema
from ctrlray.errors import ConfigError, DataError
from ctrlray.ledger import Progress, Silent
from ctrlray.patience import Patience
from ctrlray.rewards.data import Labels, read_parts
from ctrlray.rewards.evaluate import measure_sources, sources_text
from ctrlray.rewards.hf import UNITS
from ctrlray.rewards.job import FineTune, RewardTrainJob
from ctrlray.rewards.measure import half_text
from ctrlray.rewards.target import evaluation_of_trained
from ctrlray.tables import Storage, from_rows

Units = dict[str, list[float]]


def finetune(job: RewardTrainJob, folder: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Fine-tune as `job` says, from the model in `folder` (resolved from `job.model` when unset).

    Uses the running Ray. Writes the model folder `job.folder / job.name` with card.json and card.md; returns the card.
    Raises ConfigError, DataError, or ClusterError when workers failed more often than allowed.
    """
    method, progress = _method(job), progress or Silent()
    folder = models.resolve(job.model) if folder is None else folder
    fingerprint = models.fingerprint(folder)
    parts = read_parts(job)
    units = _units(job, parts)
    settings = job.model_dump(mode="json", exclude={"out", "cluster", "actors", "batch_size"})
    key = schema.digest(fingerprint, settings, {p: [len(x), schema.digest(_texts(x))] for p, x in parts.items()})
    work = Storage(str(job.folder.resolve() / f".{job.name}" / key))
    start = Path(work.path("start"))
    progress.note("reading labels")
    if not start.is_dir():
        make_start(folder, start, job, units)
    lost = write_labels(parts, job, start, units, work)
    if not work.exists("done.json"):
        _train(job, method, start, work, key, progress)
    made = job.folder / job.name
    _publish(start, work, made)
    progress.note("scoring held-out rows")
    curves = work.read_json("curves.json")
    card = _card(job, fingerprint, parts, lost, units, curves)
    card["measured"] = measure_sources(evaluation_of_trained(job))
    (made / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (made / "card.md").write_text(card_text(card), encoding="utf-8")
    (made / "curves.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    shutil.rmtree(work.path())
    with contextlib.suppress(OSError):  # another job's work may lie beside it
        Path(work.path()).parent.rmdir()
    return card


def _method(job: RewardTrainJob) -> FineTune:
    if not isinstance(job.method, FineTune):
        raise ConfigError(f"method.type={job.method.type!r}: `finetune` needs method.type=finetune")
    return job.method


def _train(job: RewardTrainJob, method: FineTune, start: Path, work: Storage, key: str, progress: Progress) -> None:
    from ctrlray.rewards.learner import RewardTask, reward_loop
    from ctrlray.train.launch import Watch, launch, waits_for, watched

    dtype = models.pick_dtype(job.model.dtype, gpu=method.gpus_per_worker > 0)
    task = RewardTask(str(start), method, work, dtype, job.seed, job.model.trust_remote_code)
    progress.note(f"training {job.name}")
    patience = Patience("reward train", job.cluster.stall_timeout_s, partial(waits_for, work, method))
    run = partial(launch, reward_loop, {"task": task}, method, f"reward-{key}", work, what="reward train")
    watched(run, Watch(job.name, work, progress), patience)


def make_start(folder: Path, start: Path, job: RewardTrainJob, units: Units) -> None:
    """Write the classifier that training starts from, with one logit per attribute, and its tokenizer.

    A head that the checkpoint lacks starts at zero, so that all answers begin alike and no random order has to be unlearned;
    other layers that it lacks (a pooler) are drawn from the job's seed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from ctrlray.quiet import quiet_transformers
    from ctrlray.rewards.encode import RewardEncoder

    quiet_transformers()
    trust = {"trust_remote_code": job.model.trust_remote_code}
    names = [a.name for a in job.attributes]
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    encode = RewardEncoder(tokenizer, job.max_tokens)
    settings = AutoConfig.from_pretrained(folder, **trust)
    if hasattr(settings, "quantization_config"):  # a folder made from a quantised file may still name its origin
        del settings.quantization_config
    settings.id2label = dict(enumerate(names))
    settings.label2id = {name: i for i, name in enumerate(names)}
    settings.pad_token_id, settings.problem_type = encode.pad_id, "regression"
    setattr(settings, UNITS, units)
    torch.manual_seed(job.seed)
    try:
        network, found = AutoModelForSequenceClassification.from_pretrained(
            folder, config=settings, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True, **trust
        )
    except ValueError as error:
        raise ConfigError(
            f"model.name={job.model.name!r}: transformers has no sequence classifier for {settings.model_type!r} models ({error})"
        ) from error
    fresh = {str(k) for k in found["missing_keys"]} | {str(k[0]) for k in found["mismatched_keys"]}
    with torch.no_grad():
        for name, parameter in _head(network, len(names)):
            if name in fresh:
                parameter.zero_()
    tokenizer.model_max_length = encode.max_tokens  # whoever loads the folder cuts where training cut
    made = start.with_name(f"{start.name}.tmp-{os.getpid()}")
    network.save_pretrained(made)
    tokenizer.save_pretrained(made)
    made.rename(start)


def _head(network: Any, num_labels: int) -> list[tuple[str, Any]]:
    """Named parameters of the last linear layer that gives the logits."""
    from torch import nn

    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_labels]
    return [(n, p) for n, p in network.named_parameters() if linear and n.rpartition(".")[0] == linear[-1]]


def write_labels(
    parts: Mapping[str, Labels], job: RewardTrainJob, start: Path, units: Units, work: Storage
) -> dict[str, dict[str, int]]:
    """Write the table `labels`; returns how many rows of each part had to be left out, by reason.

    Ratings of one answer under several attributes become one row.
    """
    from transformers import AutoTokenizer

    from ctrlray.rewards.encode import RewardEncoder

    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=job.model.trust_remote_code)
    encode, names = RewardEncoder(tokenizer, job.max_tokens), [a.name for a in job.attributes]
    margin = _method(job).margin
    rows: list[dict[str, Any]] = []
    rated: dict[tuple[str, str], dict[str, Any]] = {}
    lost: dict[str, Counter[str]] = {part: Counter() for part in parts}
    for part, labels in parts.items():
        split, name = part.split("/")
        head = names.index(name)
        for pair in labels.pairs:
            try:
                ids = [encode(pair.messages, text) for text in (pair.chosen, pair.rejected)]
            except TemplateError:
                lost[part]["chat template refuses it"] += 1
                continue
            if ids[0] == ids[1]:
                lost[part]["equal once encoded"] += 1
                continue
            gap = (pair.margin or 0.0) if margin == "rows" else margin
            rows.append(_row(split, ids[0]) | {"rejected_ids": ids[1], "head": head, "margin": gap})
        for r in labels.rated:
            at = (split, schema.digest(r.messages, r.response))
            if at not in rated:
                try:
                    rated[at] = _row(split, encode(r.messages, r.response)) | {"ratings": [float("nan")] * len(names)}
                except TemplateError:
                    lost[part]["chat template refuses it"] += 1
                    continue
                rows.append(rated[at])
            rated[at]["ratings"][head] = (r.ratings[name] - units["mean"][head]) / units["std"][head]
    for split in ("train", "valid"):
        if not any(r["split"] == split for r in rows):
            raise DataError(f"no row of attributes.*.{split} can be encoded: {lost}")
    work.write_table(from_rows(rows, schema.labels()), "labels")
    return {part: dict(reasons) for part, reasons in lost.items()}


def _row(split: str, ids: list[int]) -> dict[str, Any]:
    return {"split": split, "token_ids": ids, "rejected_ids": [], "head": -1, "margin": 0.0, "ratings": []}


def _units(job: RewardTrainJob, parts: Mapping[str, Labels]) -> Units:
    """Mean and standard deviation of each attribute's training ratings, by logit; 0 and 1 for preferences."""
    units: Units = {"mean": [], "std": []}
    margins = [p.margin for part, found in parts.items() if part.startswith("train/") for p in found.pairs]
    if _method(job).margin == "rows" and all(m is None for m in margins):
        raise DataError("method.margin='rows': no training pair has a margin; add the column, or give one number for all")
    for a in job.attributes:
        kinds = {parts[f"{split}/{a.name}"].format == "ratings" for split in ("train", "valid")}
        if len(kinds) > 1:
            raise DataError(f"attributes.{a.name}: one of train={a.train!r} and valid={a.valid!r} holds ratings, the other pairs")
        ratings = [r.ratings[a.name] for r in parts[f"train/{a.name}"].rated]
        std = float(np.std(ratings)) if ratings else 1.0
        if std == 0:
            raise DataError(f"attributes.{a.name}.train={a.train!r}: all {len(ratings)} ratings are {ratings[0]:g}")
        units["mean"].append(float(np.mean(ratings)) if ratings else 0.0)
        units["std"].append(std)
    return units


def _texts(labels: Labels) -> list[Any]:
    pairs = [[p.messages, p.chosen, p.rejected, p.margin] for p in labels.pairs]
    return pairs + [[r.messages, r.response, dict(r.ratings)] for r in labels.rated]


def _publish(start: Path, work: Storage, made: Path) -> None:
    """Merge what was learned into the start's weights, at the model's final place."""
    from ctrlray.adapter import merge

    scratch = made.with_name(f".{made.name}.tmp-{os.getpid()}")
    merge(str(start), work.path("adapter"), str(scratch))
    if made.exists():
        shutil.rmtree(made)
    scratch.rename(made)


def _card(
    job: RewardTrainJob,
    fingerprint: str,
    parts: Mapping[str, Labels],
    lost: Mapping[str, Mapping[str, int]],
    units: Units,
    curves: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    names = [a.name for a in job.attributes]
    return {
        "name": job.name,
        "model": {"name": job.model.name, "fingerprint": fingerprint},
        "attributes": names,
        "data": {
            "rows": {part: {"format": found.format, "rows": len(found)} for part, found in parts.items()},
            "dropped": {part: {**found.dropped, **lost[part]} for part, found in parts.items()},
            "judge": job.judge,
            "judge_half_reserved": job.reserve_judge_half,
        },
        "method": job.method.model_dump(mode="json"),
        "units": {name: {"mean": units["mean"][i], "std": units["std"][i]} for i, name in enumerate(names)},
        "max_tokens": job.max_tokens,
        "seed": job.seed,
        "training": {"steps": len(curves), "seconds": round(sum(p["seconds"] for p in curves), 1), "last": dict(curves[-1])},
    }


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    method, data, names = card["method"], card["data"], card["attributes"]
    how = "all weights trained" if method["lora"] is None else f"LoRA of rank {method['lora']['rank']}, merged"
    entry = f"{{type: hf, model: .../{card['name']}, attributes: [{', '.join(names)}], max_tokens: {card['max_tokens']}}}"
    lines = [
        f"# Reward model `{card['name']}`",
        "",
        f"A sequence classifier on `{card['model']['name']}` (fingerprint `{card['model']['fingerprint']}`), {how}, with one",
        f"logit for each of {', '.join(names)}. Higher is more. In a job file: `{entry}`.",
        "",
        "## Data",
        "",
        "| part | labels | rows | not used |",
        "|---|---|---|---|",
    ]
    for part, rows in data["rows"].items():
        left_out = ", ".join(f"{n} {reason}" for reason, n in data["dropped"][part].items() if n) or "-"
        lines.append(f"| {part} | {rows['format']} | {rows['rows']} | {left_out} |")
    if half := half_text(data):
        lines += ["", half]
    scaled = {name: u for name, u in card["units"].items() if data["rows"][f"train/{name}"]["format"] == "ratings"}
    if scaled:
        lines += ["", "A logit is in standard units; a rating is mean + std x logit, which ctrlray applies by itself:"]
        lines += [f"- {name}: mean {u['mean']:.4g}, std {u['std']:.4g}" for name, u in scaled.items()]
    training = card["training"]
    lines += ["", "## Training", "", f"Optimizer steps: {training['steps']}, of {method['batch_size']} rows each, in"]
    lines[-1] += f" {training['seconds']:.0f} s; learning rate {method['learning_rate']:g}, margin {method['margin']}, "
    lines[-1] += f"seed {card['seed']}."
    return "\n".join([*lines, *sources_text(card["measured"])]) + "\n"


__all__ = ["card_text", "finetune", "make_start", "write_labels"]
