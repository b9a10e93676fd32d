"""`ctrlray pipeline JOB` on simulated engines: the driver of a trial, and the only place that puts such engines into a run.

python -m benchmarks.chaos.driver JOB
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from benchmarks.chaos.simulated import SimulatedSpec
from ctrlray import cli
from ctrlray.pipeline import Run

_real = Run.engine_spec


def _simulated(run: Run) -> Any:
    spec = _real(run)
    return SimulatedSpec(**{name: getattr(spec, name) for name in asdict(spec)})


def main() -> None:
    """Run the job file that is the only argument, as the command line does."""
    Run.engine_spec = _simulated  # type: ignore[method-assign]  # that is the seam
    sys.argv[1:] = ["pipeline", *sys.argv[1:]]
    cli.entry()


if __name__ == "__main__":
    main()
