"""`ctrlray pipeline JOB` on simulated engines: the driver of a trial, and the only place that puts such engines into a run.

It stops behind the evaluation: export and report have no workers that could be killed.

python -m benchmarks.chaos.driver JOB
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from benchmarks.chaos.simulated import SimulatedSpec
from ctrlray import cli, pipeline
from ctrlray.pipeline import Run

STAGES = pipeline.STAGES[: pipeline.STAGES.index("evaluate") + 1]
_real = Run.engine_spec


def _simulated(run: Run) -> Any:
    spec = _real(run)
    return SimulatedSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)})


def main() -> None:
    """Run the job file that is the only argument, as the command line does."""
    Run.engine_spec = _simulated  # type: ignore[method-assign]  # that is the seam
    pipeline.STAGES = STAGES  # type: ignore[assignment]
    sys.argv[1:] = ["pipeline", *sys.argv[1:]]
    cli.entry()


if __name__ == "__main__":
    main()
