"""The dial to take home: seconds from `ctrlray chat --demo` in an empty cache to the first word of its answer, and what ships.

Each repeat has a cache of its own, so that it fetches and prepares the embedded model, merges the adapter and starts a server,
as for somebody who has just set up ctrlray.

    python -m benchmarks.demo_start [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.common import figure, middle, store
from benchmarks.demo import MAX_BYTES
from ctrlray import demo

MOST_S = 120.0


def first_word_s() -> float:
    """Seconds until an answer begins. Raises SystemExit when none comes."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "ctrlray", "chat", "--demo", "--max-tokens", "16"]
        began = time.monotonic()
        process = subprocess.Popen(
            command, env=os.environ | {"XDG_CACHE_HOME": cache}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"What is tea?\n")
        process.stdin.close()
        first = process.stdout.read(1)
        seconds = time.monotonic() - began
        process.stdout.read()
    if process.wait() or not first.strip():
        raise SystemExit(f"no answer came; exit code {process.returncode}")
    return seconds


def main() -> None:
    """Measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    value, spread = middle([first_word_s() for _ in range(parser.parse_args().repeats)])
    size = sum(f.stat().st_size for f in demo.asset().iterdir())
    name = "seconds from `chat --demo` in an empty cache to its answer"
    figures = [figure(name, f"<= {MOST_S:g}", value, value <= MOST_S, spread)]
    figures.append(figure("bytes of the shipped dial", f"<= {MAX_BYTES}", size, size <= MAX_BYTES))
    print(store("demo", figures))


if __name__ == "__main__":
    main()
