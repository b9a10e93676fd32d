"""Runs the trials that have no outcome yet, one after the other; when all have one, stores them and writes the page.

python -m benchmarks.chaos --root DIR [--trials 50] [--most N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.chaos.page import PAGE, figures, good, write
from benchmarks.chaos.plan import plan
from benchmarks.chaos.trial import Lab, Missed
from benchmarks.common import store
from ctrlray.pipeline import commit

TRIES = 3
"""A trial whose run ends before its victim was at work is begun anew."""


def outcomes(root: Path) -> list[dict[str, Any]]:
    """Those that are there, by number."""
    return [json.loads(path.read_text()) for path in sorted((root / "outcomes").glob("*.json"))]


def attempt(lab: Lab, number: int) -> dict[str, Any]:
    """A trial's outcome, which is kept."""
    for left in reversed(range(TRIES)):
        try:
            outcome = lab.run(plan(number))
            break
        except Missed as missed:
            print(missed, flush=True)
            if not left:
                raise
    outcome |= {"commit": commit()}
    kept = lab.root / "outcomes"
    kept.mkdir(exist_ok=True)
    (kept / f"{number:03d}.json").write_text(json.dumps(outcome, indent=1) + "\n")
    return outcome


def main() -> None:
    """Run, keep, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="keeps runs and outcomes; what has an outcome is not repeated")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--most", type=int, help="stop after so many trials, to go on later")
    options = parser.parse_args()
    lab = Lab(options.root)
    lab.root.mkdir(parents=True, exist_ok=True)
    done = {o["trial"] for o in outcomes(lab.root)}
    todo = [n for n in range(options.trials) if n not in done]
    for number in todo[: options.most]:
        outcome = attempt(lab, number)
        print(json.dumps(outcome), "" if good(outcome) else "NOT GOOD", flush=True)
    found = outcomes(lab.root)[: options.trials]
    if len(found) == options.trials:
        print(store("chaos", figures(found), outcomes=found))
        write()
        print(PAGE)


if __name__ == "__main__":
    main()
