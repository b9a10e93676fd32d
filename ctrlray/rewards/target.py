"""What `ctrlray reward evaluate` is given, as the job of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.rewards.job import FineTune, LabelledSource, RewardEvaluateJob, RewardTrainJob
from ctrlray.rewards.tfidf import is_tfidf

PACKAGED = ("embedded", "tfidf")
"""Rewards that ship with ctrlray, by their type."""


def evaluation_of(what: str, data: Sequence[str], overrides: Sequence[str]) -> RewardEvaluateJob:
    """The evaluation of a job file or a reward.

    `what`: the file of an evaluation; the file of a `reward train` job, whose result is held against its `valid` files; a
    model folder, a heads file, `embedded` or `tfidf`, held against `data` ([attribute=]file). Raises ConfigError.
    """
    path = Path(what).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        return _of_reward(what, data, overrides)
    if data:
        raise ConfigError(f"--data {data[0]!r}: {what} names its labels itself; add them to its `sources`")
    if not path.is_file():
        raise ConfigError(f"no job file at {what!r}; give one, or with --data a model folder, a heads file or one of {PACKAGED}")
    raw = config.read_job(path, overrides)
    if "reward" in raw:
        return config.parse(RewardEvaluateJob, raw, where=str(path))
    return evaluation_of_trained(config.parse(RewardTrainJob, raw, where=str(path)))


def evaluation_of_trained(job: RewardTrainJob) -> RewardEvaluateJob:
    """The result of a `reward train` job against that job's held-out rows."""
    names = tuple(a.name for a in job.attributes)
    reward: config.Reward
    if isinstance(job.method, FineTune):
        made, folder = job.folder / job.name, job.folder / job.name
        reward = config.HFReward(model=str(made), attributes=names, max_tokens=job.max_tokens)
    else:
        made, folder = job.folder / f"{job.name}.safetensors", job.folder
        tfidf = job.method.type == "tfidf"
        reward = config.TfidfReward(heads=str(made)) if tfidf else config.EmbeddedReward(heads=str(made), model=job.model.name)
    if not made.exists():
        raise ConfigError(f"there is no {made} yet; `ctrlray reward train` with the same job file makes it")
    return RewardEvaluateJob(
        name=f"{job.name}-evaluation",
        out=str(folder.resolve()),
        reward=reward,
        sources=tuple(LabelledSource(name=a.name, path=a.valid, attribute=a.name) for a in job.attributes),
        max_rows=job.max_pairs,
        seed=job.seed,
        batch_size=job.batch_size,
        actors=job.actors,
        cluster=job.cluster,
    )


def _of_reward(what: str, data: Sequence[str], overrides: Sequence[str]) -> RewardEvaluateJob:
    if not data:
        raise ConfigError(f"{what!r} is no job file (.yaml), so say what to hold it against: --data attribute=labels.jsonl")
    sources = []
    for given in data:
        attribute, sep, path = given.rpartition("=")
        sources.append({"name": attribute or Path(path).stem, "path": path} | ({"attribute": attribute} if sep else {}))
    name = what if what in PACKAGED else Path(what).resolve().stem
    raw: dict[str, Any] = {"name": name, "reward": _reward(what), "sources": sources}
    for assignment in overrides:
        config.assign(raw, assignment)
    return config.parse(RewardEvaluateJob, raw, where=f"reward evaluate {what}")


def _reward(what: str) -> dict[str, Any]:
    if what in PACKAGED:
        return {"type": what}
    path = Path(what).expanduser()
    if path.suffix == ".safetensors":
        return {"type": "tfidf" if is_tfidf(path) else "embedded", "heads": str(path.resolve())}
    if not (path / "config.json").is_file():
        raise ConfigError(f"{what!r} is no model folder, heads file (.safetensors) or job file (.yaml), and none of {PACKAGED}")
    names = json.loads((path / "config.json").read_text()).get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    return {"type": "hf", "model": str(path.resolve()), "attributes": [names[k] for k in sorted(names, key=int)]}
