"""How often a method refuses, along a dial, on prompts that should be refused and on safe ones that look like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ctrlray.metrics.bootstrap import draws, interval, numbers, weighted_mean


def refusal_rates(
    refused: ArrayLike, levels: ArrayLike, labels: Sequence[str], prompt_ids: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Share of refusals by level, then by label: `{"1": {"safe": {"value", "low", "high", "num_answers"}, "unsafe": ...}}`.

    Arrays are [N], one entry an answer; intervals resample the label's prompts. On safe prompts a refusal is an over-refusal
    (XSTest, arXiv 2308.01263). A level or label without answers is left out.
    """
    refused_N, level_N, label_N = np.asarray(refused, np.float64), np.asarray(levels), np.asarray(labels, dtype=str)
    prompts = np.asarray(prompt_ids, dtype=str)
    found: dict[str, dict[str, dict[str, Any]]] = {str(level): {} for level in np.unique(level_N)}
    for label in np.unique(label_N):
        mine = label_N == label
        prompt_M, num_prompts = numbers(prompts[mine].tolist(), int(mine.sum()), "refusals")
        weights_BP = draws(num_prompts, num_bootstrap, seed)
        for level in np.unique(level_N[mine]):
            here = level_N[mine] == level
            rate = interval(weighted_mean(refused_N[mine][here], prompt_M[here], weights_BP))
            found[str(level)][str(label)] = {**rate.as_json(), "num_answers": int(here.sum())}
    return found
