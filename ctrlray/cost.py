"""What a run cost, stage by stage, and what the same run would cost with another model, more rows or faster hardware.

Pure: accounts of finished stages in (each stage's `result.json`), JSON values out. `estimate.py` says beforehand what a job
should take; this says afterwards what it took.

    {"stages": [{"stage", "rows", "tokens", "seconds", "start_s", "tokens_per_s", "device", "devices", "device_seconds"}],
     "total": {"rows", "tokens", "seconds", "start_s", "gpu_seconds", "cpu_seconds"}, "overhead_share", "projection": null or
     {"parameters", "rows", "speedup", "stages", "total", "overhead_share", "assumptions"}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ctrlray import config
from ctrlray.errors import ConfigError

Row = dict[str, Any]

GROWS_WITH_MODEL = ("generate", "train", "evaluate", "export")
GROWS_WITH_ROWS = ("prompts", "generate", "score", "distill", "train")
ON_DEVICES = ("generate", "score", "train", "evaluate")
"""Stages that faster devices speed up; the others run in the driver."""

ASSUMPTIONS = (
    "compute-bound: seconds grow with parameters x tokens, at 2 FLOPs per parameter and token forward and 4 more backward "
    "(Kaplan et al. 2020, arXiv 2001.08361, section 2.1), so their ratio between two models is that of their parameters",
    "attention's own share, which grows with the context, and memory bandwidth are left out",
    "rows are sampled answers; their lengths, the answers per prompt and the share that distillation keeps stay as they were, "
    "though a job's distill.max_examples may end that; PPO takes the steps that it took",
    "reward models, the evaluation's prompts and grid, and the number of devices stay as they are",
    "start-ups take as long as they did; speedup is the ratio of the devices' rates and divides the rest",
)


class Held(NamedTuple):
    """Devices that a stage holds while it runs."""

    device: str
    """GPU or CPU."""
    devices: float


def held(job: config.Job, cores: int) -> dict[str, Held]:
    """Devices by stage: the full size of its pools times what each actor takes; GPUs where a stage has any, else CPUs.

    On processors a lone engine and the training workers use all `cores` of their machine, whatever they reserve. GPUs that
    PPO's engines and rewards hold while it trains are added by `cost`.
    """
    engines, rewards, train = job.generate.pool, job.score.pool, job.train
    tensor_parallel, num_rewards = job.generate.engine.tensor_parallel, len(job.teachers)
    engine_cpus = float(cores) if engines.max_size == 1 else engines.max_size * engines.cpus
    engine = _held(engines.max_size * engines.gpus * tensor_parallel, engine_cpus)
    return {
        "generate": engine,
        "score": _held(rewards.max_size * rewards.gpus * num_rewards, rewards.max_size * rewards.cpus * num_rewards),
        "train": _held(train.workers * train.gpus_per_worker, max(float(cores), train.workers * train.cpus_per_worker)),
        "evaluate": engine,
    }


def _held(gpus: float, cpus: float) -> Held:
    return Held("GPU", gpus) if gpus else Held("CPU", cpus)


def cost(results: Mapping[str, Mapping[str, Any]], devices: Mapping[str, Held]) -> dict[str, Any]:
    """The cost of the stages that finished, in their order.

    `start_s` is start-up where a stage notes it: engines, and of training whatever is not an optimizer step (workers,
    engines, snapshots, steps lost to a failure). So `overhead_share`, start-up by all seconds, is a lower bound.
    """
    stages = [_row(stage, result, results, devices) for stage, result in results.items()]
    return _whole(stages) | {"projection": None}


def _row(stage: str, result: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], devices: Mapping[str, Held]) -> Row:
    host = result["facts"].get("streamed_behind")
    seconds, start_s = float(result["seconds"]), _start_s(stage, result)
    mine = devices.get(stage, Held("CPU", 1.0))
    busy_s = float(results[host]["seconds"]) if host else seconds
    if host and mine.device == "CPU" and devices[host].device == "CPU":  # one machine's cores, counted with the host
        busy_s = 0.0
    rest_s = _rest_s(stage, result)
    rewards = devices.get("score", mine)
    device_seconds = mine.devices * (busy_s - (rest_s if mine.device == "GPU" else 0.0)) + _reinforced(result, mine, devices)
    if rewards.device == mine.device == "GPU":
        device_seconds += rewards.devices * rest_s
    return {
        "stage": stage,
        "rows": result["rows_in"],
        "tokens": result["tokens"],
        "seconds": seconds,
        "start_s": start_s,
        "tokens_per_s": _rate(result["tokens"], seconds - (start_s or 0.0) - rest_s),
        "device": mine.device,
        "devices": mine.devices,
        "device_seconds": round(device_seconds, 1),
        **({"streamed_behind": host} if host else {}),
        **({"rest_s": rest_s} if rest_s else {}),
        **({"steps": steps} if (steps := _reinforcing(result, _reinforced(result, mine, devices))) else {}),
    }


def _reinforcing(result: Mapping[str, Any], beside: float) -> dict[str, float] | None:
    """Seconds and tokens of PPO, whose steps are as many whatever the rows, and device-seconds `beside` its workers."""
    ppo = result["facts"].get("ppo")
    if not isinstance(ppo, Mapping):
        return None
    seconds = min(ppo["seconds"], float(result["seconds"]))  # those of an earlier attempt are not the stage's
    return {"seconds": seconds, "tokens": ppo.get("tokens", 0), "beside": beside}  # notes of before have no tokens


def _rest_s(stage: str, result: Mapping[str, Any]) -> float:
    """Of an evaluation, seconds in which no engine is held: rewards, judges, statistics. 0 where a run did not note it."""
    seconds = float(result["seconds"])
    engines_s = float(result["facts"].get("engines_s", seconds)) if stage == "evaluate" else seconds
    return round(max(seconds - engines_s, 0.0), 1)


def _start_s(stage: str, result: Mapping[str, Any]) -> float | None:
    facts, seconds = result["facts"], float(result["seconds"])
    if stage == "train":
        stepping = sum(f["seconds"] for f in facts.values() if isinstance(f, Mapping) and "seconds" in f)
        return round(max(seconds - float(stepping), 0.0), 1)
    return min(float(facts["start_s"]), seconds) if "start_s" in facts else None


def _reinforced(result: Mapping[str, Any], train: Held, devices: Mapping[str, Held]) -> float:
    """Device-seconds of PPO's engines and rewards beside its workers; on processors they share the workers' cores."""
    ppo = result["facts"].get("ppo")
    if not isinstance(ppo, Mapping):
        return 0.0
    beside = [devices[s].devices for s in ("generate", "score") if devices[s].device == train.device == "GPU"]
    return float(sum(beside) * ppo["seconds"])


def _rate(tokens: int | None, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if tokens and seconds > 0 else None


def _whole(stages: Iterable[Row]) -> dict[str, Any]:
    rows = list(stages)
    seconds = sum(r["seconds"] for r in rows)
    start_s = sum(r["start_s"] or 0.0 for r in rows)
    spent = {d: round(sum(r["device_seconds"] for r in rows if r["device"] == d.upper()), 1) for d in ("gpu", "cpu")}
    total = {
        "rows": sum(r["rows"] for r in rows if r["stage"] == "generate"),
        "tokens": sum(r["tokens"] or 0 for r in rows),
        "seconds": round(seconds, 1),
        "start_s": round(start_s, 1),
        **{f"{d}_seconds": n for d, n in spent.items()},
    }
    return {"stages": rows, "total": total, "overhead_share": round(start_s / seconds, 4) if seconds else None}


def project(
    costs: Mapping[str, Any],
    run_parameters: float,
    parameters: float | None = None,
    rows: int | None = None,
    speedup: float = 1.0,
) -> dict[str, Any]:
    """The same run with a model of `parameters`, `rows` sampled answers and devices that are `speedup` times as fast.

    Each is that of the run when left out. Raises ConfigError when one is not positive or the run has no sampled answers.
    """
    found = costs["total"]["rows"]
    wanted = {
        "params": run_parameters if parameters is None else parameters,
        "rows": found if rows is None else rows,
        "speedup": speedup,
    }
    for name, value in wanted.items():
        if value <= 0:
            raise ConfigError(f"{name}={value:g} must be above 0")
    if not found:
        raise ConfigError("the run has no sampled answers to project from; run `ctrlray generate` first")
    model, more = wanted["params"] / run_parameters, wanted["rows"] / found
    took = {r["stage"]: _projected_s(r, model, more, speedup) for r in costs["stages"]}
    longer = {r["stage"]: took[r["stage"]] / r["seconds"] if r["seconds"] else 0.0 for r in costs["stages"]}
    stages = [
        _projected(r, model, more, speedup, took[r["stage"]], longer[r.get("streamed_behind", r["stage"])])
        for r in costs["stages"]
    ]
    asked = {"parameters": wanted["params"], "rows": wanted["rows"], "speedup": speedup, "run_parameters": run_parameters}
    return asked | _whole(stages) | {"assumptions": list(ASSUMPTIONS)}


def _projected_s(row: Row, model: float, more: float, speedup: float) -> float:
    stage, start_s, rest_s = row["stage"], row["start_s"] or 0.0, row.get("rest_s", 0.0)
    larger, times = (model if stage in GROWS_WITH_MODEL else 1.0), (more if stage in GROWS_WITH_ROWS else 1.0)
    fixed_s = row.get("steps", {}).get("seconds", 0.0)
    grows = ((row["seconds"] - start_s - rest_s - fixed_s) * larger + rest_s) * times + fixed_s * larger
    return float(grows / (speedup if stage in ON_DEVICES else 1.0) + start_s)


def _projected(row: Row, larger: float, more: float, speedup: float, seconds: float, longer: float) -> Row:
    """`longer` is how many times as long its devices are held."""
    times = more if row["stage"] in GROWS_WITH_ROWS else 1.0
    rest_s, beside = row.get("rest_s", 0.0) * times / speedup, row.get("steps", {}).get("beside", 0.0)
    fixed = row.get("steps", {}).get("tokens", 0)
    tokens = None if row["tokens"] is None else round((row["tokens"] - fixed) * times + fixed)
    return row | {
        "rows": round(row["rows"] * times),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_s": _rate(tokens, seconds - (row["start_s"] or 0.0) - rest_s),
        "device_seconds": round((row["device_seconds"] - beside) * longer + beside * larger / speedup, 1),
        **({"rest_s": round(rest_s, 1)} if rest_s else {}),
    }


def lines(costs: Mapping[str, Any]) -> list[str]:
    """Costs and their projection as lines of text."""
    wanted = costs["projection"]
    if wanted is None:
        return _table(costs)
    size, speed = f"{wanted['parameters']:,.0f} parameters", f"devices {wanted['speedup']:g} times as fast"
    return [
        *_table(costs),
        "",
        f"projected to {size} (the run's: {wanted['run_parameters']:,.0f}), {wanted['rows']:,} answers, {speed}:",
        *_table(wanted),
        "assuming:",
        *(f"  {text}" for text in wanted["assumptions"]),
    ]


def _table(costs: Mapping[str, Any]) -> list[str]:
    head = f"{'stage':<10}{'rows':>10}{'tokens':>13}{'tokens/s':>10}{'seconds':>12}"
    head += f"{'start-up':>10}{'devices':>10}{'device-s':>13}"
    total = costs["total"]
    device_s = "  ".join(f"{total[f'{d}_seconds']:,.1f} {d.upper()}-s" for d in ("gpu", "cpu") if total[f"{d}_seconds"])
    share = "unknown" if costs["overhead_share"] is None else f"{costs['overhead_share']:.1%} at least"
    return [
        head,
        *(_line(r) for r in costs["stages"]),
        f"total: {total['seconds']:,.1f} s, {total['tokens']:,} tokens, {device_s or 'no device time'}; start-up {share}",
    ]


def _line(row: Row) -> str:
    shown = {k: "" if row[k] is None else f"{row[k]:,}" for k in ("tokens", "tokens_per_s", "start_s")}
    seconds = f"with {row['streamed_behind']}" if "streamed_behind" in row else f"{row['seconds']:,.1f}"
    held = f"{row['devices']:g} {row['device']}"
    return (
        f"{row['stage']:<10}{row['rows']:>10,}{shown['tokens']:>13}{shown['tokens_per_s']:>10}{seconds:>12}"
        f"{shown['start_s']:>10}{held:>10}{row['device_seconds']:>13,.1f}"
    )
