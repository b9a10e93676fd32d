"""Figures of training: curves over the steps, and where the seconds of reinforcement learning went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ctrlray.stages.report_figures import Figure, Rows, Style, axis, curve, dotted, plot
from ctrlray.stages.report_numbers import is_number

CURVES = {
    "valid_gap": ("Held-out code gap", "nats per token; above 0 the model reads its code"),
    "valid_nll": ("Held-out loss", "nats per token"),
    "nll": ("Training loss, right code", "nats per token"),
    "loss": ("Training objective", "as optimised"),
    "leak": ("Leak: likelihood under a wrong code", "0 to 1, lower is better"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", "of the adapters"),
    "reward": ("Reward", "level units; 0 is every requested level reached"),
    "kl": ("KL to the model it started from", "nats per response, same code"),
    "kl_base": ("KL to the base without a code", "nats per response"),
    "next_kl_coefficient": ("KL coefficient", "level units per nat"),
    "entropy": ("Entropy", "nats per token"),
    "length": ("Length of answers", "tokens"),
    "truncated": ("Answers cut off", "share of the rollouts"),
    "clip_fraction": ("Clipped tokens", "share"),
    "ratio_spread": ("Spread of the policy ratio", "standard deviation over tokens"),
    "explained_variance": ("Explained variance of the critic", "1 is perfect, 0 is none"),
    "mismatch": ("Trainer against engine", "mean difference of log-probs, nats per token"),
    "importance": ("Importance weight", "mean over tokens"),
    "staleness": ("Staleness of the rollouts", "versions of the weights"),
    "prefix_hit_rate": ("Prefix cache", "share of prompt tokens found in it"),
}


PHASES = ("generate", "score", "sync", "measure", "forward", "backward", "optimizer", "publish")
"""Seconds of a step of reinforcement learning, in the order in which they pass; curves call them `<phase>_s`."""


_LEVEL_COLORS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#d9c21e", "#e08a00", "#d55e00")


def curve_figures(curves: Mapping[str, Sequence[Mapping[str, Any]]], look: Mapping[str, Style]) -> list[Figure]:
    """One plot per recorded quantity, all methods in it; quantities that were never recorded are left out."""
    figures = []
    for key, (title, unit) in CURVES.items():
        traces, words, drawn = [], [], []
        for method, points in curves.items():
            kept = [(p["step"], p[key]) for p in points if is_number(p.get("step")) and is_number(p.get(key))]
            if kept:
                traces.append(curve(method, kept, look[method]))
                drawn += [[method, *at] for at in kept]
                (first, start), (last, end) = kept[0], kept[-1]
                words.append(f"{method} from {start:.3g} at step {first} to {end:.3g} at step {last}")
        if traces:
            shapes = [dotted(y=0)] if key == "valid_gap" else []
            layout = {"xaxis": {"title": {"text": "optimizer step"}}, "yaxis": _curve_axis(key), "shapes": shapes}
            alt = f"{title} by step: {'; '.join(words)}."
            figures.append(plot(title, alt, traces, 250, note=unit, rows=[["method", "step", key], *drawn], **layout))
    return figures


def achieved_figures(attributes: Sequence[str], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """Per attribute: what answers reached by the level that they were asked for, along reinforcement learning."""
    figures = []
    for name in attributes:
        for method, points in curves.items():
            start = f"achieved_{name}_"
            levels = sorted({int(k.removeprefix(start)) for p in points for k in p if k.startswith(start)})
            if not levels:
                continue
            traces, shapes, words = [], [], []
            drawn: Rows = [["level asked for", "step", f"achieved {name}"]]
            for i, level in enumerate(levels):
                color = _LEVEL_COLORS[round(i * 9 / max(1, len(levels) - 1))]
                kept = [(p["step"], p[f"{start}{level}"]) for p in points if is_number(p.get(f"{start}{level}"))]
                if not kept:
                    continue
                traces.append(curve(f"level {level}", kept, Style(color, "circle", "")))
                shapes.append({**dotted(y=level), "line": {"dash": "dot", "width": 1, "color": color}})
                drawn += [[level, *at] for at in kept]
                words.append(f"level {level} from {kept[0][1]:.2f} to {kept[-1][1]:.2f}")
            more: dict[str, Any] = {"xaxis": axis("step"), "yaxis": axis("level units"), "shapes": shapes}
            title = f"{name} reached by level asked for, {method}"
            alt = f"{title}: {'; '.join(words)}."
            note = "dotted: the level itself"
            figures.append(plot(title, alt, traces, 280, note=note, rows=drawn, showlegend=True, **more))
    return figures


def phase_figures(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """Where the seconds of reinforcement learning go, step by step."""
    figures = []
    for method, points in curves.items():
        if not any(is_number(p.get("generate_s")) for p in points):
            continue
        traces, words = [], []
        for i, phase in enumerate(PHASES):
            values = [p.get(f"{phase}_s", 0.0) for p in points]
            words.append(f"{phase} {sum(values) / len(values):.2f} s")
            color = _LEVEL_COLORS[(i * 7) % 10]
            traces.append(go.Bar(x=[p["step"] for p in points], y=values, name=phase, marker={"color": color}))
        title = f"Seconds of a step, {method}"
        alt = f"{title}, means: {', '.join(words)}."
        more: dict[str, Any] = {"xaxis": axis("step"), "yaxis": axis("seconds"), "barmode": "stack", "bargap": 0}
        drawn: Rows = [["step", *PHASES], *([p["step"], *(p.get(f"{phase}_s", 0.0) for phase in PHASES)] for p in points)]
        figures.append(plot(title, alt, traces, 280, rows=drawn, showlegend=True, **more))
    return figures


def _curve_axis(key: str) -> dict[str, Any]:
    if key == "lr":
        return {"exponentformat": "power"}
    return {"rangemode": "tozero"} if key in ("valid_gap", "leak", "truncated", "staleness") else {}
