"""Objectives of reward models. Shape key: P preference pairs, N answers, A attributes. Scores are logits of the network.

Totals over the whole batch (`num_pairs`, `num_ratings`) come as arguments, so that a loss summed over micro batches and ranks
equals the loss of the one big batch.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ctrlray.objectives.losses import Loss


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor, *, num_pairs: float) -> Loss:
    """Mean of -log sigmoid(chosen - rejected - margin) over the batch's pairs.

    With margin 0 the negative log-likelihood of the preferences under Bradley and Terry (Biometrika 39, 1952), as in
    InstructGPT (arXiv 2203.02155 eq. 1). A margin asks for a larger gap where the preference is stronger (Llama 2,
    arXiv 2307.09288 eq. 2, which leaves its size open). `accuracy` is the share of pairs with chosen above rejected, without
    the margin; a tie counts one half.
    """
    gap_P = chosen_P - rejected_P
    loss = -logsigmoid(gap_P - margin_P).sum() / num_pairs
    right = ((gap_P > 0).sum() + 0.5 * (gap_P == 0).sum()) / num_pairs
    return Loss(loss, {"bradley_terry": loss.detach(), "accuracy": right.detach()})


def regression(score_NA: Tensor, rating_NA: Tensor, rated_NA: Tensor, *, num_ratings: float) -> Loss:
    """Mean squared error over the batch's ratings.

    `rated_NA` is 1 where an answer has a rating of an attribute; what `rating_NA` holds elsewhere does not count. Every rating
    counts alike, whichever attribute it is of. (Linear heads with this loss: HelpSteer2, arXiv 2406.08673.)
    """
    error_NA = (score_NA - rating_NA.nan_to_num()) * rated_NA
    loss = error_NA.square().sum() / num_ratings
    return Loss(loss, {"squared_error": loss.detach()})
