"""Runs the trials that have no outcome yet, one after the other, stores what is known and writes the page.

What is stored in `results/chaos.json` counts as known; remove it to begin anew.

python -m benchmarks.chaos --root DIR [--most N] [--only N ...]
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.chaos.page import PAGE, STORED, figures, good, write
from benchmarks.chaos.plan import TRIALS
from benchmarks.chaos.trial import Lab, Missed
from benchmarks.common import cpu, store
from ctrlray.pipeline import commit


def outcomes(root: Path) -> list[dict[str, Any]]:
    """Those that are stored, and those of this root, by number."""
    stored = json.loads(STORED.read_text())["outcomes"] if STORED.is_file() else []
    own = [json.loads(path.read_text()) for path in (root / "outcomes").glob("*.json")]
    known = {o["trial"]: o for o in (*stored, *own)}
    return [known[number] for number in sorted(known)]


def attempt(lab: Lab, number: int) -> dict[str, Any]:
    """A trial's outcome, which is kept. Raises Missed."""
    outcome = lab.outcome(number) | {"commit": commit(), "cpu": cpu()}
    kept = lab.root / "outcomes"
    kept.mkdir(exist_ok=True)
    made = kept / f"{number:03d}.new"
    made.write_text(json.dumps(outcome, indent=1) + "\n")
    made.replace(made.with_suffix(".json"))
    return outcome


def main() -> None:
    """Run, keep, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="keeps runs and outcomes; what has an outcome is not repeated")
    parser.add_argument("--most", type=int, help="stop after so many trials, to go on later")
    parser.add_argument("--only", type=int, nargs="+", help="of these numbers")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the drivers, in sessions of their own, are ended too
    lab = Lab(options.root)
    lab.root.mkdir(parents=True, exist_ok=True)
    done = {o["trial"] for o in outcomes(lab.root)}
    todo = [n for n in options.only or range(TRIALS) if n not in done]
    for number in todo[: options.most]:
        try:
            outcome = attempt(lab, number)
        except Missed as missed:  # the others go on; the same command tries this one again
            print(f"trial {number}: {missed}", flush=True)
            continue
        print(json.dumps(outcome), "" if good(outcome) else "NOT GOOD", flush=True)
    found = outcomes(lab.root)
    print(store("chaos", figures(found), outcomes=found), f"{len(found)} of {TRIALS} trials")
    write()
    print(PAGE)


if __name__ == "__main__":
    main()
