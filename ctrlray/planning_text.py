"""A plan of `planning` as text: phases with their actors and nodes, memory of each kind of process, stages with their dollars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def lines(plan: Row) -> list[str]:
    """A plan as text."""
    prices = plan["prices"]
    return [
        f"{plan['job']} on {plan['cluster']}: a model of {plan['parameters'] / 1e9:.2f} billion parameters",
        "",
        *_phase_lines(plan["phases"]),
        "",
        *_memory_lines(plan["memory"]),
        "",
        *_stage_lines(plan["stages"], plan["total"]),
        "",
        f"rates: {plan['rates']}; prices: {prices['source']}, {prices['as_of']}. Assuming:",
        *(f"  {text}" for text in plan["assumptions"]),
    ]


def _phase_lines(phases: Sequence[Row]) -> Iterator[str]:
    yield f"{'phase':<19} {'actors':<26} {'nodes':<15} {'CPUs':>6} {'GPUs':>6} {'GiB/GPU':>8} {'host GiB':>9}"
    for p in phases:
        for a in p["actors"]:
            span = f"{a['least']} to {a['planned']}" if a["least"] < a["planned"] else f"{a['planned']}"
            device = f"{a['gpu_gib']:.1f}" if a["gpus"] else "-"
            yield (
                f"{p['phase']:<19} {span + ' x ' + a['operator']:<26} {a['nodes'] or 'any':<15} {a['cpus']:>6g} {a['gpus']:>6g} "
                f"{device:>8} {a['host_gib']:>9.1f}"
            )
        up = ", ".join(f"{count} x {name}" for name, count in p["nodes"].items()) or "the head alone"
        yield f"{'':<19} {p['gpus']:g} GPUs; up: {up}; ${p['dollars_per_hour']:.2f} an hour with the head"


def _memory_lines(rows: Sequence[Row]) -> Iterator[str]:
    parts = ("weights", "cache", "gradients", "optimizer", "activations", "process", "loading")
    yield f"{'GiB of one device':<28} " + " ".join(f"{p:>11}" for p in parts) + f" {'most':>7} {'has':>7}"
    for r in rows:
        who = f"{r['operator']} on {r['device']}"
        yield f"{who:<28} " + " ".join(f"{r[p]:>11.2f}" for p in parts) + f" {r['total']:>7.1f} {r['has']:>7.1f}"
        if "cache_tokens" in r:
            yield f"{'':<28} the cache of an engine grows to {r['cache_tokens']:,} tokens"


def _stage_lines(stages: Sequence[Row], total: Row) -> Iterator[str]:
    yield f"{'stage':<10} {'rows':>9} {'tokens at most':>15} {'tokens/s':>10} {'rate':<14} {'minutes':>9} {'dollars':>9}"
    for s in stages:
        rate = f"{s['tokens_per_s']:,.0f}" if s["tokens_per_s"] else "-"
        cost = f"with {s['beside']}" if s["beside"] else f"{s['dollars']:.2f}"
        yield (
            f"{s['stage']:<10} {s['rows']:>9,} {s['tokens']:>15,} {rate:>10} {s['basis']:<14} {s['seconds'] / 60:>9.1f} {cost:>9}"
        )
    yield f"{'total':<10} {'':>9} {'':>15} {'':>10} {'':<14} {total['seconds'] / 60:>9.1f} {total['dollars']:>9.2f}"
