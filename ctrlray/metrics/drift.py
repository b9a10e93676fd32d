"""How far a trained method went from the model it was made of, in what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from ctrlray.metrics.bootstrap import Interval, draws, interval, numbers, weighted_mean


def kl_base(logp: ArrayLike, base_logp: ArrayLike, prompt_ids: list[str], num_bootstrap: int, seed: int) -> Interval:
    """Mean over answers of log p(answer | prompt, code) - log p_base(answer | prompt), in nats per answer.

    Both are sums over the answer's tokens at temperature 1. Of answers sampled at that temperature the mean is unbiased for
    KL(method || base) of whole answers (k1 of John Schulman, "Approximating KL Divergence", 2020). Of greedy answers it is
    how much likelier training made what the method says first, which is no KL in the strict sense. Arrays are [N].
    """
    logp_N, base_N = np.asarray(logp, np.float64), np.asarray(base_logp, np.float64)
    prompt_N, num_prompts = numbers(prompt_ids, len(logp_N), "KL to the base")
    return interval(weighted_mean(logp_N - base_N, prompt_N, draws(num_prompts, num_bootstrap, seed)))


def kl_by_method(drift: pa.Table, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """`kl_base` of every method in a `drift` table, JSON-ready."""
    methods = drift["method"].to_pylist()
    found = {}
    for method in sorted(set(methods)):
        own = drift.filter(pa.array([m == method for m in methods]))
        columns = (own["logp"].to_numpy(), own["base_logp"].to_numpy(), own["prompt_id"].to_pylist())
        found[method] = kl_base(*columns, num_bootstrap, seed).as_json()
    return found
