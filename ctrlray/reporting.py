"""Gathers a run's tables into its report: the only reader of every stage's output at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ctrlray import config, cost, models, schema
from ctrlray.metrics.alarms import alarms
from ctrlray.metrics.control import code_gap

if TYPE_CHECKING:
    from ctrlray.pipeline import Run
    from ctrlray.tables import Storage

SAMPLE_PROMPTS = 6
PROJECTED_ROWS, PROJECTED_PARAMETERS = 10, 7e9
"""Two sizes that the page projects costs to: so many times the answers, and a model of so many parameters."""


def write_report(run: Run) -> str:
    """Write report.html at the run root; returns its address."""
    from ctrlray.stages.report import render

    page = render(gather(run))
    run.storage.write_bytes(page.encode(), "report.html")
    return f"{run.storage.uri}/report.html"


_PASSES = {
    "segments": "one pass held a prompt once and all of its answers",
    "flex": "one pass held a prompt once and all of its answers (FlexAttention)",
    "separate": "each answer was a sequence of its own, because this network's attention takes no tree rows",
}
"""What the paths of `ctrlray.train.attention` mean."""


def gather(run: Run) -> Any:
    """Everything the report shows."""
    from ctrlray.pipeline import STAGES, machine, versions
    from ctrlray.stages.report import ReportData

    job = run.job
    results = {s: r for s in STAGES if (r := run.result(s)) is not None}
    facts = results["distill"]["facts"]
    metrics = run.out("evaluate").read_json("metrics.json")
    curves: dict[str, Any] = {o.type: run.out("train").sub(o.type).read_json("curves.json") for o in job.train.objectives}
    model = models.describe(models.resolve(job.model))
    warnings = [{"name": "distillation", "severity": "warning", "detail": w} for w in facts["warnings"]]
    return ReportData(
        job_name=job.name,
        job_yaml=yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False),
        model={"name": job.model.name} | model,
        versions=versions(),
        machine=machine(),
        started=results["prompts"]["started"],
        run_root=run.storage.uri,
        attributes=[{"name": a.name, "levels": a.levels} for a in job.control.attributes],
        ledger=[{"stage": s, "status": _status(r)} | r for s, r in results.items()],
        cells_before=facts["cells_before"],
        cells_after=facts["cells_after"],
        strategy=job.distill.strategy,
        curves=curves,
        passes={m: _PASSES[path] for m in curves if (path := results["train"]["facts"][m].get("path"))},
        code_gaps=code_gaps(run),
        metrics=metrics,
        spent=results["evaluate"]["facts"].get("spent", {}),
        pool_slopes=facts["pool_slopes"],
        samples=_samples(run),
        alarms=[*alarms(metrics, facts["cells_before"], facts["cells_after"], job.distill.strategy, job.control), *warnings],
        reward_card=_reward_card(run),
        **_evaluated(run),
        **_costs(run, results, model["parameters"]),
    )


def _evaluated(run: Run) -> dict[str, Any]:
    """What the evaluation left beside its metrics; some of it only where the job has judges or prompt sets."""
    from ctrlray.stages.judging import FOLDER

    out = run.out("evaluate")
    found = {n.removesuffix(".json"): out.read_json(n) for n in out.names(suffix=".json")}
    judge = found.get("judge", {})
    names = [n.removeprefix("metrics-") for n in found if n.startswith("metrics-")]
    return {
        "comparisons": found.get("comparisons", ()),
        "judge": {m: r for m, r in judge.items() if m != "correlation"},
        "judge_comparisons": out.read_json(FOLDER, "comparisons.json") if judge else (),
        "correlation": judge.get("correlation", {}),
        "hacking": found.get("hacking", {}),
        "refusals": found.get("refusals", {}),
        "sets": {n: {"metrics": found[f"metrics-{n}"], "judge": found.get(f"judge-{n}", {})} for n in names},
    }


def _costs(run: Run, results: Mapping[str, Any], parameters: float) -> dict[str, Any]:
    """What the finished stages cost, and would cost at two other sizes."""
    from ctrlray.pipeline import machine

    spent = cost.cost(results, cost.held(run.job, int(machine()["cores"])))
    rows = spent["total"]["rows"]
    if not rows or not parameters:
        return {"costs": spent}
    larger = cost.project(spent, parameters, rows=PROJECTED_ROWS * rows), cost.project(spent, parameters, PROJECTED_PARAMETERS)
    return {"costs": spent, "projections": larger}


def _status(result: Mapping[str, Any]) -> str:
    """A stage that streamed behind another spent its time there."""
    host = result["facts"].get("streamed_behind")
    return f"streamed with {host}" if host else "done"


def _reward_card(run: Run) -> dict[str, str] | None:
    """What is known of the embedded heads, when the job uses them; rewards of the user's own bring their own cards."""
    for reward in run.job.teachers:
        if isinstance(reward, config.EmbeddedReward):
            path = Path(reward.heads) if reward.heads else Path(str(resources.files("ctrlray") / "assets/heads/smollm2-hh"))
            file = path.with_suffix(".json")
            return _flat_card(json.loads(file.read_text())["measured"]) if file.is_file() else None
    return None


def _flat_card(measured: Mapping[str, Any]) -> dict[str, str]:
    """`{"helpfulness accuracy": "0.651 [0.599, 0.700]", ...}`: every figure that has an interval."""
    rows = {}
    for name, values in measured["attributes"].items():
        for key, value in values.items():
            if isinstance(value, list) and len(value) == 3 and key != "train_accuracy":
                rows[f"{name}: {key.replace('_', ' ')}"] = "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    for name, value in measured.get("correlations", {}).items():
        rows[f"within-prompt correlation, {name}"] = "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    return rows


def code_gaps(run: Run) -> dict[str, dict[str, Any]]:
    """Per objective: NLL under wrong codes minus under the right one on held-out examples, with its interval."""
    found: dict[str, dict[str, Any]] = {}
    for objective in run.job.train.objectives:
        table = run.out("train").sub(objective.type).read_table("code_gaps", schema.code_gaps())
        if not table.num_rows:
            continue
        interval = code_gap(
            table["nll_right"].to_numpy(),
            table["nll_wrong"].to_numpy(),
            table["prompt_id"].to_pylist(),
            run.job.evaluate.bootstrap,
            run.job.seed,
        )
        found[objective.type] = dict(interval._asdict()) | {"num_examples": table.num_rows}
    return found


def headline(run: Run, method: str) -> dict[str, str]:
    """The few figures that belong on a model card and at the end of a terminal run."""
    figures = {}
    if method in (gaps := code_gaps(run)):
        figures["held-out code gap, nats per token"] = _interval(gaps[method])
    return figures | control_figures(run.out("evaluate"), method, run.job.evaluate.sampling)


def control_figures(evaluated: Storage, method: str, sampling: config.Sampling) -> dict[str, str]:
    """Those of the evaluation, by what it left in a folder and how it sampled; none where it has not run."""
    figures = {}
    if evaluated.exists("metrics.json"):
        measured = evaluated.read_json("metrics.json")[method]
        for name, values in measured["attributes"].items():
            figures[f"{name}: pairwise order accuracy (chance 0.5)"] = _interval(values["pairwise"])
            figures[f"{name}: mean absolute error, levels"] = _interval(values["mae"])
        if kl := measured.get("kl_base"):
            plain = (sampling.temperature, sampling.top_p, sampling.min_p) == (1.0, 1.0, 0.0)
            drift = "KL to the base" if plain else "log-probability over the base's"  # of other samples the mean is no KL
            figures[f"{drift} without a code, nats per answer"] = _interval(kl)
    if evaluated.exists("judge.json"):
        judged = evaluated.read_json("judge.json")
        for name, values in judged[method]["attributes"].items():
            figures[f"{name}: pairwise order accuracy under the judge"] = _interval(values["pairwise"])
            within = judged["correlation"][name]["within_prompt"]
            figures[f"{name}: the judge's correlation with the training reward, within a prompt"] = _interval(within)
    return figures


def _interval(value: Mapping[str, Any]) -> str:
    if None in value.values():
        return "undefined" if value["value"] is None else f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _samples(run: Run) -> list[dict[str, Any]]:
    """Sample answers along the dial: a few prompts, all methods."""
    names = [a.name for a in run.job.control.attributes]
    judged = bool(run.job.judges)
    grid = run.out("evaluate").read_table("grid", schema.grid(names, judged=judged)).to_pylist()
    prompts = {p["prompt_id"]: p["messages"] for p in run.prompts("eval").to_pylist()}
    methods = [o.type for o in run.job.train.objectives] + list(run.job.evaluate.methods)
    samples = []
    answered = {r["prompt_id"] for r in grid}
    for prompt in sorted(p for p in prompts if p in answered)[:SAMPLE_PROMPTS]:
        for method in methods:
            rows = [r for r in grid if r["prompt_id"] == prompt and r["method"] == method and r["sample"] == 0]
            rows.sort(key=lambda r: tuple(r[f"requested_{n}"] for n in names))
            cells = [
                {
                    "levels": [r[f"requested_{n}"] for n in names],
                    "text": r["text"],
                    "units": [r[f"units_{n}"] for n in names],
                    "judge": [r[f"judge_units_{n}"] for n in names] if judged else None,
                    "finish_reason": r["finish_reason"],
                }
                for r in rows[: 1 if method == "start" else None]
            ]
            text = "\n\n".join(f"{m['role']}: {m['content']}" for m in prompts[prompt])
            samples.append({"prompt": text, "method": method, "cells": cells})
    return samples
