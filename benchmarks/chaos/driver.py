"""`ctrlray pipeline JOB` on simulated engines: the driver of a trial, and the only place that puts such engines into a run.

It stops behind the stage LAST.

python -m benchmarks.chaos.driver JOB LAST
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from benchmarks.chaos.simulated import SimulatedSpec
from ctrlray import cli
from ctrlray.pipeline import STAGES, Run

_real = Run.engine_spec


def _simulated(run: Run) -> Any:
    spec = _real(run)
    return SimulatedSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)})


def main() -> None:
    """Run the job file that is the first argument up to the stage that is the second, as the command line does."""
    job, last = sys.argv[1:]
    stages, run = STAGES[: STAGES.index(last) + 1], cli._run
    Run.engine_spec = _simulated  # type: ignore[method-assign]  # that is the seam
    # the command's stages alone: a run has keys for all of them, and its closing summary asks for the last ones
    cli._run = lambda _, *rest: run(stages, *rest)
    sys.argv[1:] = ["pipeline", job]
    cli.entry()


if __name__ == "__main__":
    main()
