"""How good rewards are: accuracies, calibration and correlations with 95% intervals, and the card of reward heads.

Nothing is fitted here. Accuracies have Wilson intervals; correlations and means have bootstrap intervals over prompts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ctrlray.rewards.heads import Answers, Floats, Ints, Preferences, within

Estimate = list[float]
"""[value, low, high], the last two a 95% interval."""
_Z = 1.959963984540054


class Heads(Protocol):
    """Linear heads of any kind of features, dense or sparse."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the heads."""
        ...

    def score(self, features: Any) -> Floats:
        """Scores [N, A] of features [N, F]."""
        ...


def wilson(wins: float, total: int) -> Estimate:
    """A share with its Wilson score interval (Wilson 1927); `wins` may hold halves, for ties."""
    if total == 0:
        return [math.nan, 0.0, 1.0]
    p, z2 = wins / total, _Z * _Z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    return [p, centre - half, centre + half]


def accuracy(margins: Floats) -> Estimate:
    """Share of margins [P] above 0; a tie counts one half."""
    return wilson(float((margins > 0).sum() + 0.5 * (margins == 0).sum()), len(margins))


def length_only(gaps: Floats) -> tuple[Estimate, str]:
    """Accuracy on pairs of a rule that looks at length alone, and which rule: the better one on these very pairs.

    `gaps` [P]: log length of chosen less that of rejected. Being chosen with hindsight it is flattered, if anything.
    """
    longer, shorter = accuracy(gaps), accuracy(-gaps)
    return (longer, "longer wins") if longer[0] >= shorter[0] else (shorter, "shorter wins")


def calibration(margins: Floats, bins: int) -> dict[str, Any]:
    """How often the favoured answer of a pair won, beside the probability that the margins [P] gave it.

    The favoured answer of a margin m is given sigmoid(|m|), from 0.5 to 1, which `bins` equal bins divide. `ece` is the
    expected calibration error, the mean over pairs of |predicted - observed| of their bin (Naeini et al. 2015); `log_loss`
    the mean of -log sigmoid(m), ln 2 = 0.693 for a coin.
    """
    predicted = 1 / (1 + np.exp(-np.abs(np.asarray(margins, np.float64))))
    won = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))
    index = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    table: list[dict[str, Any]] = []
    for b in np.unique(index):
        here = index == b
        count = int(here.sum())
        low, given = 0.5 + int(b) / (2 * bins), float(predicted[here].mean())
        observed = wilson(float(won[here].sum()), count)
        table.append({"low": low, "high": low + 0.5 / bins, "count": count, "predicted": given, "observed": observed})
    error = sum(row["count"] * abs(row["predicted"] - row["observed"][0]) for row in table) / max(1, len(margins))
    return {"bins": table, "ece": float(error), "log_loss": float(np.logaddexp(0, -np.asarray(margins, np.float64)).mean())}


def mean(values: Floats, groups: Ints, *, seed: int, draws: int = 1000) -> Estimate:
    """Mean of values [M] with a bootstrap interval over groups."""
    _, index = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(index, weights=values), np.bincount(index)])
    low, high = np.quantile([top / bottom for top, bottom in _redrawn(sums, seed, draws)], [0.025, 0.975])
    return [float(np.mean(values)), float(low), float(high)]


def correlation(u: Floats, v: Floats, groups: Ints, *, seed: int, draws: int = 1000, across: bool = False) -> Estimate:
    """Pearson correlation of u and v [M], each centred within its group, with a bootstrap interval over groups.

    Groups of one answer carry no information about it and drop out by the centring. `across`: centred over all answers
    instead, so that differences between groups count too.
    """
    _, index = np.unique(groups, return_inverse=True)
    centres = np.zeros_like(index) if across else groups
    u, v = within(np.asarray(u, np.float64), centres), within(np.asarray(v, np.float64), centres)
    sums = np.stack([np.bincount(index, weights=w) for w in (u * v, u * u, v * v)])  # [3, G]
    uv, uu, vv = np.stack(list(_redrawn(sums, seed, draws)), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN where nothing varies, which the estimate then says
        low, high = np.nanquantile(uv / np.sqrt(uu * vv), [0.025, 0.975])
        value = sums[0].sum() / np.sqrt(sums[1].sum() * sums[2].sum())
    return [float(value), float(low), float(high)]


def spearman(u: Floats, v: Floats, groups: Ints, *, seed: int) -> Estimate:
    """Rank correlation of u and v [M] over all answers, ties at their mean rank, with a bootstrap interval over groups."""
    from scipy.stats import rankdata

    return correlation(rankdata(u), rankdata(v), groups, seed=seed, across=True)


def _redrawn(sums: Any, seed: int, draws: int) -> Iterator[Floats]:
    """Totals of `draws` resamples of the groups of sums [K, G], each [K]."""
    rng, groups = np.random.default_rng(seed), sums.shape[1]
    for _ in range(draws):
        yield sums[:, rng.integers(0, groups, groups)].sum(-1)


def report(
    heads: Heads, train: Mapping[str, Preferences], valid: Mapping[str, Preferences], pool: Answers, *, seed: int
) -> dict[str, Any]:
    """All measures of `heads` on held-out pairs and on held-out prompts of the pool.

    The length-only baseline picks longer or shorter by which is right more often in training.
    """
    out: dict[str, Any] = {"attributes": {}}
    scores = heads.score(pool.features) if len(pool.length) else np.zeros((0, len(heads.attributes)))
    for i, name in enumerate(heads.attributes):
        sign = 1.0 if float(np.sign(train[name].length_gap).mean()) >= 0 else -1.0
        margins = {b: margin(heads, p)[:, i] for b, p in valid.items()}
        part: dict[str, Any] = {
            "train_accuracy": accuracy(margin(heads, train[name])[:, i]),
            "accuracy": accuracy(margins[name]),
            "length_only": accuracy(sign * valid[name].length_gap),
            "length_only_rule": "longer wins" if sign > 0 else "shorter wins",
            "accuracy_on_others": {b: accuracy(m) for b, m in margins.items() if b != name},
        }
        if len(pool.length):
            part["length_correlation"] = correlation(scores[:, i], pool.length, pool.prompt, seed=seed)
        out["attributes"][name] = part
    if len(pool.length):
        out["correlations"] = {
            f"{a}~{b}": correlation(scores[:, i], scores[:, j], pool.prompt, seed=seed)
            for i, a in enumerate(heads.attributes)
            for j, b in enumerate(heads.attributes)
            if i < j
        }
    return out


def margin(heads: Heads, pairs: Preferences) -> Floats:
    """score(chosen) - score(rejected), [P, A]."""
    return heads.score(pairs.chosen) - heads.score(pairs.rejected)


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    measured, data = card["measured"], card["data"]
    lines = [
        f"# Reward heads `{card['name']}`",
        "",
        f"Linear heads on the frozen model `{card['model']['name']}` (fingerprint `{card['model']['fingerprint']}`), which",
        f"score {', '.join(measured['attributes'])} of a finished answer in its conversation. Higher is more. They are small and",
        "linear: good enough to drive and to measure a dial in development, not to decide what may be shown to people.",
        "",
        "## Data",
        "Preference pairs in Anthropic HH's native format, by part: "
        + "; ".join(f"{part} {n}" for part, n in data["pairs"].items())
        + ".",
    ]
    if half := half_text(data):
        lines.append(half)
    pool = data["pool"]
    if pool["answers"]:
        lines.append(
            f"Unlabelled pool: {pool['answers']} finished answers that the model itself gave to {pool['prompts']} prompts under "
            f"several behaviours; the penalties saw {pool['fit_prompts']} of the prompts, correlations are measured on the rest."
        )
    lines += ["", "## Measured", "Held-out pairs, with 95% intervals (Wilson).", ""]
    others = list(measured["attributes"])
    lines.append("| head | own pairs | length alone, same rows | " + " | ".join(f"on {b} pairs" for b in others) + " |")
    lines.append("|---" * (3 + len(others)) + "|")
    for name, m in measured["attributes"].items():
        cross = [show(m["accuracy_on_others"][b]) if b != name else "(own)" for b in others]
        lines.append(
            f"| {name} | {show(m['accuracy'])} | {show(m['length_only'])} ({m['length_only_rule']}) | {' | '.join(cross)} |"
        )
    if "correlations" in measured:
        lines += ["", "Correlations within a prompt, on held-out prompts of the pool (bootstrap over prompts).", ""]
        lines += ["| what | r |", "|---|---|"]
        lines += [f"| {pair.replace('~', ' with ')} | {show(r)} |" for pair, r in measured["correlations"].items()]
        lines += [f"| {n} with log length | {show(m['length_correlation'])} |" for n, m in measured["attributes"].items()]
    lines += ["", "## What was tried", *_trials(card)]
    return "\n".join(lines) + "\n"


def half_text(data: Mapping[str, Any]) -> str:
    """Which half of the training dialogues was learned from; empty when it was both."""
    if data.get("judge"):
        return "Only the half of the training dialogues whose first human turn falls to held-out judges was used."
    if data["judge_half_reserved"]:
        return "The half of the training dialogues whose first human turn falls to held-out judges was not used."
    return ""


def _trials(card: Mapping[str, Any]) -> list[str]:
    names = list(card["measured"]["attributes"])
    head = ["setting", "layers", "positions", "l2", "cross", "length", "pair_length", "between"]
    head += [f"{n} accuracy" for n in names] + ["r between"] + [f"r {n}, length" for n in names]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    chosen = {"chosen": {"fit": card["fit"], "measured": card["measured"]}}
    for name, trial in {**chosen, **card["trials"]}.items():
        fit, m = trial["fit"], trial["measured"]
        cells: list[Any] = [name, _join(fit["layers"]), _join(fit["positions"])]
        cells += [f"{fit[k]:g}" for k in ("l2", "cross", "length", "pair_length", "between")]
        cells += [f"{m['attributes'][n]['accuracy'][0]:.3f}" for n in names]
        cells.append(", ".join(f"{r[0]:+.2f}" for r in m.get("correlations", {}).values()) or "-")
        cells += [f"{m['attributes'][n].get('length_correlation', [math.nan])[0]:+.2f}" for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _join(values: Sequence[Any]) -> str:
    return ", ".join(str(v) for v in values)


def show(estimate: Sequence[float | None]) -> str:
    """`0.650 [0.601, 0.697]`; a dash where there was nothing to estimate."""
    value, low, high = (math.nan if x is None else x for x in estimate)
    return "-" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"
