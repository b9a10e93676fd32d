"""The whole pipeline: how much of its wall time is useful compute, and where the rest goes.

The quickstart with 200 prompts and 4 answers to each, as one process from its start to its exit, into an empty run root; the
embedded model and its control rows are prepared before. Useful is what the bare compute would take too: sampling, from the
moment an engine is up; scoring, from the first block of scores; optimizer steps; the likelihoods of held-out examples and those
of the grid's answers under the base. All else counts as outside: imports, start of Ray, of engines, reward actors and training
workers, merging, export, report, exit.

Times of engines and blocks are those of the files that the run itself writes; the rest comes from the notes of its progress.

    python -m benchmarks.pipeline [--repeats 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import figure, middle, store
from ctrlray import config, models, pipeline
from ctrlray.clock import TOOK
from ctrlray.control import ControlSpace
from ctrlray.ledger import Silent
from ctrlray.stages.questions import DRIFT, ENGINES

ROOT = Path(__file__).parent.parent
PROMPTS, SAMPLES, MOST_OUTSIDE = 200, 4, 0.10
SETS = (f"prompts.train={PROMPTS}", f"generate.samples={SAMPLES}")
USEFUL = (
    "sampling",
    "scoring behind it",
    "optimizer steps",
    "held-out likelihoods",
    "sampling of the grid",
    "likelihoods under the base",
    "scoring of the grid",
)
Seconds = dict[str, float]


class Notes(Silent):
    """When a stage began, said something, and finished rows."""

    def __init__(self) -> None:
        self.began = time.time()
        self.said: dict[str, float] = {}
        self.rows: list[float] = []

    def note(self, text: str) -> None:
        """The first time that it says so."""
        self.said.setdefault(text, time.time())

    def advance(self, rows: int, tokens: int = 0) -> None:
        """An optimizer step in the train stage."""
        self.rows.append(time.time())


def job(root: str) -> config.Job:
    return config.load_job("quickstart", (f"run_root={root}", *SETS))


def child(root: str) -> None:
    """One run, and where its stages spent their seconds."""
    notes: dict[str, Notes] = {}
    run = pipeline.run(job(root), progress=lambda stage: notes.setdefault(stage, Notes()))
    folders = {stage: Path(run.out(stage).path()) for stage in pipeline.STAGES}
    parts = {
        **of_generation(folders["generate"], folders["score"], notes["generate"]),
        **of_training(folders["train"] / "exmate", notes["train"]),
        **of_evaluation(folders["evaluate"], notes["evaluate"]),
    }
    stages = {stage: float((run.result(stage) or {})["seconds"]) for stage in pipeline.STAGES}
    for stage in ("prompts", "distill", "export", "report"):
        parts[stage] = stages[stage]
    print("RESULT " + json.dumps({"parts": parts, "stages": stages}), flush=True)


def ends(folder: Path, *, of: str = "responses") -> list[float]:
    """When each block of a table was written, in order."""
    return sorted(p.stat().st_mtime for p in (folder / of).glob("*.parquet"))


def first_block(times: Sequence[float]) -> float:
    """When work on the first block began, if it took as long as the others did on average."""
    return times[0] - (times[-1] - times[0]) / max(len(times) - 1, 1)


def of_generation(generate: Path, score: Path, notes: Notes) -> Seconds:
    """Sampling with scoring behind it: engine up, last answers, last scores, end of the stage."""
    (up,) = (p.stat().st_mtime for p in (generate / "starts").iterdir())
    sampled, scored = ends(generate)[-1], ends(score, of="scores")[-1]
    return {
        "start of Ray's actors and vLLM": up - notes.began,
        "sampling": sampled - up,
        "scoring behind it": max(scored - sampled, 0.0),
        "end of generate": (generate / "result.json").stat().st_mtime - max(scored, sampled),
    }


def of_training(folder: Path, notes: Notes) -> Seconds:
    """Optimizer steps and what lies before, between and after them; the driver sees a step a second late at most."""
    curve = json.loads((folder / "curves.json").read_text())
    steps, held_out = [p["seconds"] for p in curve], sum(p.get("valid_seconds", 0.0) for p in curve)
    began, ended = notes.rows[0] - steps[0], notes.rows[-1]
    return {
        "start of training workers": began - notes.began,
        "optimizer steps": sum(steps),
        "held-out likelihoods": held_out,
        "snapshots": max(ended - began - sum(steps) - held_out, 0.0),
        "end of training": (folder.parent / "result.json").stat().st_mtime - ended,
    }


def of_evaluation(folder: Path, notes: Notes) -> Seconds:
    """The grid: engine up, last answers, their likelihoods, first and last scores, statistics."""
    (up,) = (p.stat().st_mtime for p in (folder / "starts").iterdir())
    took = {p.stem: json.loads(p.read_text())["seconds"] for p in (folder / TOOK).glob("*.json") if p.stem != ENGINES}
    compared, blocks = ends(folder, of=DRIFT)[-1], ends(folder, of="scores")
    likelihoods = took.pop(DRIFT)
    sampling, scoring = sum(took.values()), max(first_block(blocks), compared)
    return {
        "start of the grid's engine": up - notes.began,
        "sampling of the grid": sampling,
        "likelihoods under the base": likelihoods,
        "merging and loading of weights": compared - up - sampling - likelihoods,
        "start of the grid's reward actors": scoring - compared,
        "scoring of the grid": blocks[-1] - scoring,
        "statistics of the grid": (folder / "result.json").stat().st_mtime - blocks[-1],
    }


def measure() -> dict[str, Any]:
    """A run in a process of its own: its wall seconds, and its parts with what no stage saw."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.time()
        command = [sys.executable, "-m", "benchmarks.pipeline", "--child", scratch]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        wall = time.time() - began
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    parts: Seconds = found["parts"]
    parts["imports, start and end of Ray"] = wall - sum(parts.values())
    return {"wall": wall, "parts": parts, "stages": found["stages"]}


def figures(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share outside useful compute, and every part of the wall time."""
    shares = [1 - sum(r["parts"][p] for p in USEFUL) / r["wall"] for r in runs]
    value, spread = middle(shares)
    name = f"share of wall time outside useful compute, {PROMPTS} prompts x {SAMPLES} answers"
    made = [figure(name, f"<= {MOST_OUTSIDE}", value, value <= MOST_OUTSIDE, spread)]
    value, spread = middle([r["wall"] for r in runs])
    made.append(figure("seconds in all", "recorded", value, None, spread))
    for part in runs[0]["parts"]:
        value, spread = middle([r["parts"][part] for r in runs])
        kind = "useful" if part in USEFUL else "outside"
        made.append(figure(f"seconds, {kind}: {part}", "recorded", round(value, 1), None, [round(s, 1) for s in spread]))
    return made


def main() -> None:
    """Run, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    models.prepare(job("/nowhere").model, ControlSpace.of(job("/nowhere").control))
    runs = []
    for _ in range(options.repeats):
        runs.append(measure())
        print(f"{runs[-1]['wall']:.0f} s", *(f"{k} {v:.1f}" for k, v in runs[-1]["parts"].items()), sep="\n  ", flush=True)
    stages = {s: round(statistics.median(r["stages"][s] for r in runs), 1) for s in runs[0]["stages"]}
    print(store("pipeline", figures(runs), cores=os.cpu_count(), seconds_by_stage=stages))


if __name__ == "__main__":
    main()
