"""Linear reward heads on fixed features, and their joint fit. numpy and scipy only; features come from elsewhere.

Shape key: A attributes, F features, P preference pairs of one attribute, M pool answers, N answers. Lengths are natural
logs of token counts. A margin is score(chosen) - score(rejected), in log-odds of the preference (Bradley-Terry).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from ctrlray.errors import ConfigError

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
FORMAT = 1


@dataclass(frozen=True)
class Heads:
    """Heads of one model: `score = ((features - mean) / scale) @ weights.T + bias`."""

    attributes: tuple[str, ...]
    layers: tuple[int, ...]
    """Blocks whose output the features are, counted from 1."""
    positions: tuple[str, ...]
    """Where in the answer they are read; features run over layers first, then positions."""
    mean: Floats  # [F]
    scale: Floats  # [F]
    weights: Floats  # [A, F]
    bias: Floats  # [A]
    fingerprint: str
    """Of the model that the features came from; another model's features mean nothing to these weights."""
    response_format: str = "chat template, answer, end-of-turn token"

    def score(self, features: Floats) -> Floats:
        """Scores [N, A], float32, of features [N, F]."""
        if features.ndim != 2 or features.shape[1] != self.mean.size:
            raise ConfigError(f"heads for {self.mean.size} features got an array of shape {features.shape}")
        standard = (np.asarray(features, np.float32) - self.mean) / self.scale
        return np.asarray(standard @ self.weights.T + self.bias, np.float32)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file whose metadata holds everything but the arrays."""
        from safetensors.numpy import save

        meta = {k: getattr(self, k) for k in ("attributes", "layers", "positions", "fingerprint", "response_format")}
        arrays = {k: np.ascontiguousarray(getattr(self, k), np.float32) for k in ("mean", "scale", "weights", "bias")}
        # One JSON value: a header with several keys is written in an order that changes from process to process.
        note = json.dumps({"format": FORMAT, **meta}, sort_keys=True)
        Path(path).write_bytes(save(arrays, metadata={"ctrlray.heads": note}))

    @classmethod
    def load(cls, path: str | Path) -> Heads:
        """Read what `save` wrote; ConfigError when the file is not a heads file of this format."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                meta = json.loads((file.metadata() or {})["ctrlray.heads"])
                arrays = {k: file.get_tensor(k) for k in ("mean", "scale", "weights", "bias")}
            if meta.pop("format") != FORMAT:
                raise ConfigError(f"{path} has another format; make the heads again with this version")
            lists: dict[str, Any] = {k: tuple(meta.pop(k)) for k in ("attributes", "layers", "positions")}
            return cls(**lists, **meta, **arrays)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a heads file ({error}); `ctrlray reward train` makes one") from error


@dataclass(frozen=True)
class Preferences:
    """Pairs of one attribute as features."""

    chosen: Floats  # [P, F]
    rejected: Floats  # [P, F]
    length_gap: Floats  # [P], log tokens of chosen minus log tokens of rejected


@dataclass(frozen=True)
class Answers:
    """Unlabelled answers, several to a prompt."""

    features: Floats  # [M, F]
    prompt: Ints  # [M], equal for the answers of one prompt
    length: Floats  # [M], log tokens


@dataclass(frozen=True)
class Penalties:
    """Strength of each pull away from the plain Bradley-Terry fit; 0 turns it off."""

    l2: float
    """Half of it times the squared norm of each head, on standardised features."""
    cross: float
    """On the other attributes' pairs, chosen and rejected should score alike on average."""
    length: float
    """Scores should not follow length within a prompt of the pool."""
    pair_length: float
    """Margins should not follow the pairs' difference in length. People often prefer longer answers, so this costs accuracy."""
    between: float
    """Heads should not follow each other within a prompt of the pool."""


def within(values: Floats, groups: Ints) -> Floats:
    """Rows [M, ...] less the mean of their group."""
    _, index = np.unique(groups, return_inverse=True)
    count = np.bincount(index)
    sums = np.zeros((len(count), *values.shape[1:]))
    np.add.at(sums, index, values)
    return np.asarray(values - (sums / count.reshape(-1, *[1] * (values.ndim - 1)))[index])


def squared_cosine(u: Floats, v: Floats) -> tuple[float, Floats, Floats]:
    """cos^2 = (u.v)^2 / (|u|^2 |v|^2) with its gradients in u and v; 0 when either is 0.

    For centred vectors this is the squared Pearson correlation. Being free of scale it cannot be met by shrinking a head.
    """
    uu, vv, uv = float(u @ u), float(v @ v), float(u @ v)
    if uu * vv == 0.0:
        return 0.0, np.zeros_like(u), np.zeros_like(v)
    value = uv * uv / (uu * vv)
    factor = 2 * uv / (uu * vv)
    return value, factor * v - 2 * value / uu * u, factor * u - 2 * value / vv * v


class Objective:
    """The joint loss of all heads and its gradient, on standardised features.

    loss = sum_a  mean_P log(1 + exp(-margin_a))                       own pairs, Bradley-Terry
         + l2/2 * |w_a|^2
         + cross   * sum_{b != a} cos^2(margins of a on b's pairs, 1)   cos^2 = mean^2 / mean square
         + length  * r^2(score_a, length) on the pool
         + pair_length * sum_b cos^2(margins of a on b's pairs, length gap of b)
         + between * sum_{b > a} r^2(score_a, score_b) on the pool

    On the pool scores and lengths are centred within each prompt. With A = 1 `cross` and `between` vanish.
    """

    def __init__(self, gaps: Sequence[Floats], length_gaps: Sequence[Floats], pool: Floats, length: Floats, by: Penalties):
        self.gaps, self.length_gaps, self.pool, self.length, self.by = gaps, length_gaps, pool, length, by

    def __call__(self, flat: Floats) -> tuple[float, Floats]:
        """Loss and gradient at the weights [A * F]."""
        weights = flat.reshape(len(self.gaps), -1)
        loss, grad = 0.5 * self.by.l2 * float(flat @ flat), self.by.l2 * weights
        scores = [self.pool @ w for w in weights]
        for a, w in enumerate(weights):
            for b, gap in enumerate(self.gaps):
                part, by_margin = self._on_pairs(gap @ w, self.length_gaps[b], own=a == b)
                loss += part
                grad[a] += gap.T @ by_margin
            value, by_score, _ = squared_cosine(scores[a], self.length)
            loss += self.by.length * value
            grad[a] += self.by.length * (self.pool.T @ by_score)
            for b in range(a + 1, len(weights)):
                value, by_a, by_b = squared_cosine(scores[a], scores[b])
                loss += self.by.between * value
                grad[a] += self.by.between * (self.pool.T @ by_a)
                grad[b] += self.by.between * (self.pool.T @ by_b)
        return loss, grad.ravel()

    def _on_pairs(self, margin: Floats, length_gap: Floats, *, own: bool) -> tuple[float, Floats]:
        """Loss of one head on one attribute's pairs, and its gradient in the margins [P]."""
        length, by_margin, _ = squared_cosine(margin, length_gap)
        loss, grad = self.by.pair_length * length, self.by.pair_length * by_margin
        if own:
            loss += float(np.logaddexp(0, -margin).mean())
            return loss, grad - 1 / (1 + np.exp(np.clip(margin, -500, 500))) / len(margin)
        bias, by_margin, _ = squared_cosine(margin, np.ones_like(margin))
        return loss + self.by.cross * bias, grad + self.by.cross * by_margin


def fit_heads(
    preferences: Mapping[str, Preferences],
    pool: Answers | None,
    penalties: Penalties,
    *,
    layers: Sequence[int],
    positions: Sequence[str],
    fingerprint: str,
    max_iterations: int = 2000,
) -> Heads:
    """Fit one head per attribute, all at once (see `Objective`), by L-BFGS.

    Features are standardised by the answers of all pairs. Scores are shifted to mean 0 over the pool, or over the
    pairs' answers without one; a shift changes no margin.
    """
    both = np.concatenate([x for p in preferences.values() for x in (p.chosen, p.rejected)]).astype(np.float64)
    mean, scale = both.mean(0), both.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    gaps = [(p.chosen.astype(np.float64) - p.rejected) / scale for p in preferences.values()]
    centre: Floats = both
    answers: Floats = np.zeros((0, both.shape[1]))
    length: Floats = np.zeros(0)
    if pool is not None:
        centre = pool.features.astype(np.float64)
        answers, length = within(centre / scale, pool.prompt), within(pool.length.astype(np.float64), pool.prompt)
    objective = Objective(gaps, [p.length_gap for p in preferences.values()], answers, length, penalties)
    # All zeros is a corner of the cosines, so start from the mean difference of each attribute's pairs, kept small.
    start = np.stack([g.mean(0) for g in gaps])
    start *= 0.1 / np.maximum(np.linalg.norm(start, axis=1, keepdims=True), 1e-12)
    result = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": max_iterations})
    weights = result.x.reshape(len(gaps), -1)
    bias = -(((centre - mean) / scale) @ weights.T).mean(0)
    return Heads(
        attributes=tuple(preferences),
        layers=tuple(layers),
        positions=tuple(positions),
        mean=np.asarray(mean, np.float32),
        scale=np.asarray(scale, np.float32),
        weights=np.asarray(weights, np.float32),
        bias=np.asarray(bias, np.float32),
        fingerprint=fingerprint,
    )
