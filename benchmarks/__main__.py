"""Runs the benchmarks that fit this machine one after the other; what `ctrlray bench` calls.

Each is a process of its own and stores `results/<name>.json` with target, measured value, spread and whether it is met. At the
end stands what was measured, and docs/performance.md is written anew. Exits with 1 when a benchmark failed to run; a target that
is not met is a finding and no failure.

    python -m benchmarks [--list] [NAME ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from benchmarks import performance
from benchmarks.common import cpu
from benchmarks.registry import FOLDER, Benchmark, chosen, lacks
from ctrlray.pipeline import machine


def described(benchmark: Benchmark) -> str:
    """A line of the list."""
    peer = f", against {benchmark.against}" if benchmark.against else ""
    state = lacks(benchmark) or f"some {benchmark.minutes} minutes"
    return f"{benchmark.name:<14}{benchmark.title}{peer}: {state}"


def run(benchmarks: Sequence[Benchmark]) -> int:
    """Run those that fit, print their figures, write the page; returns the exit code."""
    done, failed = [], []
    for benchmark in benchmarks:
        if missing := lacks(benchmark):
            print(f"{benchmark.name}: left out, {missing}", flush=True)
            continue
        print(f"{benchmark.name}: some {benchmark.minutes} minutes", flush=True)
        code = subprocess.run([sys.executable, *benchmark.command], cwd=FOLDER.parent, check=False).returncode
        (failed if code else done).append(benchmark)
    stored = performance.stored()
    for benchmark in done:
        print(f"\n{benchmark.name}", *performance.lines(stored[benchmark.name]["figures"]), sep="\n")
    if done:
        performance.write()
        print(f"\nwritten: {performance.PAGE}")
    for benchmark in failed:
        print(f"failed: {benchmark.name}; its own words stand above", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """List or run."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ctrlray bench", description=__doc__, formatter_class=shape)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what fits this machine, and how long it takes")
    options = parser.parse_args()
    try:
        wanted = chosen(options.names)
    except ValueError as error:
        parser.error(str(error))
    print(f"machine: {cpu()}, " + ", ".join(f"{k} {v}" for k, v in machine().items()), flush=True)
    if options.list:
        print(*map(described, wanted), sep="\n")
        return 0
    return run(wanted)


if __name__ == "__main__":
    sys.exit(main())
