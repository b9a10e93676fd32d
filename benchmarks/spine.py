"""The spine's figures into `results/B.json`: another attribute pair in 20 minutes, a quick help, memory as planned, fast tests.

The brevity job runs whole in a process of its own under `--root`, resumed when interrupted (its minutes are those of its stages).
While it runs, the resident memory of its engine and its training worker is read once a second, beside the formula's.

    python -m benchmarks.spine --root /data/ctrlray-spine
    CI_HOME=/data/ci .ci/run && python -m benchmarks.spine --ci /data/ci
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import RESULTS, figure, store
from ctrlray import config, models, placement
from ctrlray.pipeline import STAGES, Run, commit
from ctrlray.reporting import code_gaps

ROOT = Path(__file__).parent.parent
JOB = ROOT / "jobs" / "brevity" / "job.yaml"
ACTORS = {"engine": "GenerateBatch", "worker": "RayTrainWorker"}
"""Ray names a process after what it runs."""


class Peaks:
    """Peak resident memory in GiB of processes by their names, among the descendants of this process."""

    def __init__(self) -> None:
        self.gib: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            for process in psutil.Process().children(recursive=True):
                try:
                    words, size = " ".join(process.cmdline()), process.memory_info().rss / 2**30
                except psutil.Error:
                    continue
                for name, mark in ACTORS.items():
                    if mark in words:
                        self.gib[name] = max(self.gib.get(name, 0.0), size)


def brevity(root: Path) -> tuple[Run, dict[str, float]]:
    """The brevity job as a user runs it, and the peaks of memory that were seen (none when it had run before)."""
    sets = [f"run_root={root}"]
    with Peaks() as peaks:
        subprocess.run([sys.executable, "-m", "ctrlray", "pipeline", str(JOB), "--set", *sets], check=True)
    return Run(config.load_job(JOB, sets)), peaks.gib


def control_figures(run: Run) -> list[dict[str, Any]]:
    """Time, the dial of brevity, and the code gap."""
    minutes = sum((run.result(s) or {})["seconds"] for s in STAGES) / 60
    values = run.out("evaluate").read_json("metrics.json")["exmate"]["attributes"]
    made = [figure("brevity job, minutes of its stages", "< 20", round(minutes, 1), minutes < 20)]
    for name, measure, target, least in (
        ("brevity", "spearman_level_means", ">= 0.9", 0.9),
        ("brevity", "pairwise", ">= 0.7", 0.7),
        ("coverage", "spearman_level_means", "no target", None),
        ("coverage", "pairwise", "no target", None),
    ):
        v = values[name][measure]
        met = None if least is None else v["value"] >= least
        bounds = [round(v["low"], 4), round(v["high"], 4)]
        made.append(figure(f"{name}, {measure}, ExMATE", target, round(v["value"], 4), met, bounds))
    gap = code_gaps(run)["exmate"]
    bounds = [round(gap["low"], 4), round(gap["high"], 4)]
    return [*made, figure("held-out code gap, nats per token", "no target", round(gap["value"], 4), None, bounds)]


def memory_figures(run: Run, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """The plan's memory with the dtype that this machine picks, beside the peaks."""
    dtype = models.pick_dtype(run.job.model.dtype, gpu=False)
    job = run.job.model_copy(update={"model": run.job.model.model_copy(update={"dtype": dtype})})
    planned = {g.operator: g.memory_gib for g in placement.plan(job, models.shape(models.resolve(job.model)))}
    return [
        figure(f"{name}: peak GiB; planned {planned[name]:.2f}", "0.7 to 1.1 of the plan", round(peaks[name], 2),
               0.7 * planned[name] <= peaks[name] <= 1.1 * planned[name])
        for name in ACTORS
        if name in peaks
    ]  # fmt: skip


def help_figure(repeats: int = 7) -> dict[str, Any]:
    """Seconds until `ctrlray --help` has printed, a new process each time."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ctrlray", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    middle = statistics.median(seconds)
    bounds = [round(min(seconds), 3), round(max(seconds), 3)]
    return figure("ctrlray --help, seconds", "< 0.5", round(middle, 3), middle < 0.5, bounds)


def tests_figure() -> dict[str, Any]:
    """Minutes of plain `pytest`, which must pass."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pytest", "-q"], check=True, cwd=ROOT)
    minutes = (time.perf_counter() - began) / 60
    return figure("pytest, minutes", "< 5", round(minutes, 2), minutes < 5)


def ci_figure(home: Path) -> dict[str, Any]:
    """Minutes of `.ci/run`, which passed, as it noted them in its home, and the commit that it ran at."""
    seconds, of = (home / "seconds").read_text().split()
    minutes = int(seconds) / 60
    return figure(".ci/run in a fresh clone, minutes", "< 60", round(minutes, 1), minutes < 60) | {"commit": of}


def main() -> None:
    """Run, measure, store. Each figure keeps the commit that it was measured at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="where the brevity job runs")
    parser.add_argument("--only", choices=["brevity", "help", "tests"], help="measure one part, keep the others' figures")
    parser.add_argument("--ci", type=Path, metavar="HOME", help="CI_HOME of a finished .ci/run: its minutes, others are kept")
    options = parser.parse_args()
    if options.ci:
        options.only = "ci"
    elif options.root is None and options.only in (None, "brevity"):
        parser.error("--root: the brevity job needs it")
    path = RESULTS / "B.json"
    kept = json.loads(path.read_text()) if options.only and path.is_file() else {"figures": [], "slopes": {}}
    figures, slopes = {f["name"].split(";")[0]: f for f in kept["figures"]}, kept["slopes"]
    made: list[dict[str, Any]] = []
    if options.only in (None, "brevity"):
        run, peaks = brevity(options.root.resolve())
        made += [*control_figures(run), *memory_figures(run, peaks)]
        slopes = {
            "pool": (run.result("distill") or {})["facts"]["pool_slopes"],
            "exmate": run.out("evaluate").read_json("metrics.json")["exmate"]["slopes"],
        }
    if options.only in (None, "help"):
        made.append(help_figure())
    if options.only in (None, "tests"):
        made.append(tests_figure())
    if options.ci:
        made.append(ci_figure(options.ci))
    figures |= {f["name"].split(";")[0]: {"commit": commit()} | f for f in made}
    print(store("B", list(figures.values()), slopes=slopes))


if __name__ == "__main__":
    main()
