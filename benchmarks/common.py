"""What every benchmark stores beside its figures: the machine, the commit, targets and spread."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrlray.pipeline import machine, versions

RESULTS = Path(__file__).parent / "results"


def figure(name: str, target: str, measured: float | None, met: bool | None, spread: Any = None) -> dict[str, Any]:
    """One figure: what was asked for, what was measured, its spread, and whether it is met."""
    return {"name": name, "target": target, "measured": measured, "spread": spread, "met": met}


def middle(values: Sequence[float]) -> tuple[float, list[float]]:
    """Median, and least and greatest."""
    return round(statistics.median(values), 4), [round(min(values), 4), round(max(values), 4)]


def store(name: str, figures: Sequence[dict[str, Any]], **extra: Any) -> Path:
    """Write `benchmarks/results/<name>.json`."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    facts = {"cpu": cpu(), **machine()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"commit": commit, "machine": facts, "versions": versions(), "figures": list(figures), **extra}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def cpu() -> str:
    """The processor by its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
