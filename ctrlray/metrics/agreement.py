"""Agreement of raters with each other and with a reference, from counts that add up over prompts.

Every coefficient is a function of one matrix per draw, so `weights_BP @ counts` gives its bootstrap (`metrics.bootstrap`).
Shape key: R raters, U rated items, N single ratings, K categories, P prompts, B draws. A choice between two answers has
the categories 0 = B, 1 = tie, 2 = A, in this order; -1 stands for no rating.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ctrlray.metrics.bootstrap import Floats, Ints, divide

B_BETTER, TIE, A_BETTER = 0, 1, 2
NUM_CHOICES = 3
MISSING = -1


def confusions(first_N: Ints, second_N: Ints, prompt_N: Ints, num_prompts: int, num_categories: int = NUM_CHOICES) -> Floats:
    """counts_PKK: how often the first label was k where the second was l, by prompt; rows without both do not count."""
    counts_PKK = np.zeros((num_prompts, num_categories, num_categories))
    known = (first_N != MISSING) & (second_N != MISSING)
    np.add.at(counts_PKK, (prompt_N[known], first_N[known], second_N[known]), 1.0)
    return counts_PKK


def coincidences(ratings_RU: Ints, prompt_U: Ints, num_prompts: int, num_categories: int = NUM_CHOICES) -> Floats:
    """counts_PKK: Krippendorff's coincidences, ordered pairs of ratings of one item by two raters over (ratings - 1).

    An item with one rating has no pair (Krippendorff 2011, step "coincidence matrix"); -1 is a missing rating.
    """
    per_UK = np.stack([(ratings_RU == k).sum(axis=0) for k in range(num_categories)], axis=1).astype(np.float64)
    given_U = per_UK.sum(axis=1)
    pairs_UKK = per_UK[:, :, None] * per_UK[:, None, :] - np.einsum("uk,kl->ukl", per_UK, np.eye(num_categories))
    share_UKK = np.divide(pairs_UKK, (given_U - 1)[:, None, None], out=np.zeros_like(pairs_UKK), where=given_U[:, None, None] > 1)
    counts_PKK = np.zeros((num_prompts, num_categories, num_categories))
    np.add.at(counts_PKK, prompt_U, share_UKK)
    return counts_PKK


def drawn(weights_BP: Floats, counts_PKK: Floats) -> Floats:
    """counts_BKK: the counts of each draw."""
    return np.asarray(np.einsum("bp,pkl->bkl", weights_BP, counts_PKK))


def cohen_kappa(counts_BKK: Floats) -> Floats:
    """(p_o - p_e) / (1 - p_e), p_e from both margins (Cohen 1960, eq. 1); NaN where chance alone agrees always."""
    total_B = counts_BKK.sum(axis=(1, 2))
    observed_B = divide(np.trace(counts_BKK, axis1=1, axis2=2), total_B)
    expected_B = divide((counts_BKK.sum(axis=1) * counts_BKK.sum(axis=2)).sum(axis=1), total_B**2)
    return divide(observed_B - expected_B, 1 - expected_B)


def krippendorff_alpha(coincidences_BKK: Floats, metric: Literal["nominal", "ordinal"]) -> Floats:
    """1 - D_o / D_e (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"); NaN where all ratings are equal.

    The squared difference of two categories is 1 (nominal), or (ratings from the one to the other, each end counted
    half)^2 (ordinal), from the margins of the draw.
    """
    margins_BK = coincidences_BKK.sum(axis=2)
    num_B = margins_BK.sum(axis=1)
    differences_BKK = _differences(margins_BK, metric)
    observed_B = (coincidences_BKK * differences_BKK).sum(axis=(1, 2))
    expected_B = (margins_BK[:, :, None] * margins_BK[:, None, :] * differences_BKK).sum(axis=(1, 2))
    return np.asarray(1 - (num_B - 1) * divide(observed_B, expected_B))


def both_ways(counts_BKK: Floats) -> Floats:
    """coincidences_BKK of two observers without gaps, the first and the second label: each pair counts both ways round."""
    return np.asarray(counts_BKK + counts_BKK.transpose(0, 2, 1))


def _differences(margins_BK: Floats, metric: str) -> Floats:
    num_categories = margins_BK.shape[1]
    if metric == "nominal":
        return np.tile(1 - np.eye(num_categories), (len(margins_BK), 1, 1))
    middle_BK = np.cumsum(margins_BK, axis=1) - margins_BK / 2  # ratings below a category, and half of its own
    return np.asarray((middle_BK[:, :, None] - middle_BK[:, None, :]) ** 2)


def decided(counts_BKK: Floats) -> Floats:
    """counts_B22: choices between two answers without the ties of either side."""
    return counts_BKK[:, [B_BETTER, A_BETTER]][:, :, [B_BETTER, A_BETTER]]


def accuracy(counts_BKK: Floats) -> Floats:
    """Share of equal labels; NaN without any."""
    return divide(np.trace(counts_BKK, axis1=1, axis2=2), counts_BKK.sum(axis=(1, 2)))


def order_accuracy(counts_BKK: Floats) -> Floats:
    """Share of choices (first label) for the reference's side (second), a rater's tie counting one half; chance 0.5.

    Over the pairs that the reference decides: pairwise order accuracy (`metrics.control`) with the rater as the score.
    """
    right_B = counts_BKK[:, A_BETTER, A_BETTER] + counts_BKK[:, B_BETTER, B_BETTER]
    ties_B = counts_BKK[:, TIE, A_BETTER] + counts_BKK[:, TIE, B_BETTER]
    return divide(right_B + ties_B / 2, counts_BKK[:, :, [B_BETTER, A_BETTER]].sum(axis=(1, 2)))
