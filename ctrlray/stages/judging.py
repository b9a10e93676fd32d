"""The evaluation's second regime: held-out judges score what the training rewards scored, on scales of their own.

grid answers ──┐
pool ──────────┼─► judges ─► judge/scores ─► levels of the pool (judge/levels.json) ─► judge_* columns, judge.json
PPO's rollouts ┘                                                                        └─► hacking.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from ctrlray import config
from ctrlray.distill import Levels, usable
from ctrlray.errors import DataError
from ctrlray.ledger import Progress
from ctrlray.metrics.bootstrap import numbers
from ctrlray.rewards.measure import correlation
from ctrlray.stages.grid import Scored, Texts, score_texts, text_id
from ctrlray.stages.score import Conversations, job_attributes
from ctrlray.tables import Storage

FOLDER = "judge"


class Pool:
    """The sampled answers that scales are fitted on: those that distillation fits the training rewards' scales on."""

    def __init__(self, scored: pa.Table, job: config.Job, special_ids: Set[int] = frozenset()) -> None:
        """`scored` has prompt_id, text, token_ids, finish_reason and `score_<attribute>` columns, sorted by response_id."""
        self.rows = scored.take(pa.array(usable(scored, job.distill.keep_truncated, special_ids), pa.int64()))
        self.prompts = [str(p) for p in self.rows["prompt_id"].to_pylist()]
        texts = [str(t).strip() for t in self.rows["text"].to_pylist()]
        self.ids = [text_id(p, t) for p, t in zip(self.prompts, texts, strict=True)]
        self.texts: Texts = {key: pair for key, *pair in zip(self.ids, self.prompts, texts, strict=True)}  # type: ignore[misc]


def judge(texts: Texts, pool: Pool, chats: Conversations, job: config.Job, out: Storage, progress: Progress) -> Scored:
    """The judges' scores of `texts` and of the pool, each distinct text once, with the scales that the pool gives.

    Writes `scores`, `quarantine` and `levels.json` below `out`. Raises DataError when no answer of the pool could be scored.
    """
    scores = score_texts({**pool.texts, **texts}, chats, job.judges, job, out, progress)
    known = [scores[key] for key in pool.ids if key in scores]
    if not known:
        raise DataError(f"evaluate: the judges scored none of the pool's {len(pool.ids)} answers; look at {out.uri}/quarantine")
    scales = {a.name: Levels.fit([row[a.name] for row in known], a.levels) for a in job.control.attributes}
    out.write_json({name: scale.to_dict() for name, scale in scales.items()}, "levels.json")
    return Scored(scores, scales)


def as_judged(grid: pa.Table, job: config.Job) -> pa.Table:
    """A grid with the judges' scores and units in place of the training rewards'."""
    for name in job_attributes(job):
        for kind in ("score", "units"):
            here = grid.column_names.index(f"{kind}_{name}")
            grid = grid.set_column(here, f"{kind}_{name}", grid[f"judge_{kind}_{name}"])
    return grid


def agreement(pool: Pool, job: config.Job, scales: Mapping[str, Levels], judged: Scored) -> dict[str, Any]:
    """By attribute, Pearson's correlation of the judges' and the training rewards' level units over the pool.

    `overall` and `within_prompt` (both centred within each prompt) with bootstrap intervals over prompts, null where nothing
    varies, and `num_answers`. Level units are ranks in the pool up to ties, so this is close to Spearman's.
    """
    found: dict[str, Any] = {}
    for name in job_attributes(job):
        theirs = judged.units(name, pool.ids)
        ours = scales[name].units(pool.rows[f"score_{name}"].to_numpy())
        fine = np.isfinite(theirs)
        prompt_N, _ = numbers([p for p, f in zip(pool.prompts, fine, strict=True) if f], int(fine.sum()), "judge")
        how = partial(correlation, theirs[fine], ours[fine], prompt_N, seed=job.seed, draws=job.evaluate.bootstrap)
        found[name] = {"overall": _json(how(across=True)), "within_prompt": _json(how()), "num_answers": int(fine.sum())}
    return found


def _json(estimate: Sequence[float]) -> dict[str, float | None]:
    return {key: value if np.isfinite(value) else None for key, value in zip(("value", "low", "high"), estimate, strict=True)}
