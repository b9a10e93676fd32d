"""Finds the benchmarks of a clone and runs them in a process of their own; what they measure stands in `benchmarks/`.

The package holds none of them: they time ctrlray beside libraries that it does not depend on, what they store is kept under
version control with the commit that it was measured at, and docs/performance.md is written out of that. So there must be a
clone: the one that the package runs from, or else the working directory.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ctrlray.errors import ConfigError

FOLDER = "benchmarks"


def clone(installed: Path = Path(__file__).parent.parent) -> Path:
    """The top of the clone. Raises ConfigError where there is none."""
    here = Path.cwd()
    for top in (installed, here):
        if (top / FOLDER / "__main__.py").is_file():
            return top
    raise ConfigError(
        f"benchmarks are part of the repository, not of the installed package, and {here} holds no clone of it; "
        "clone the repository and run `ctrlray bench` in its top folder"
    )


def run(names: Sequence[str], lists: bool) -> int:
    """Run benchmarks by name, or all that fit; or list them. Returns the exit code."""
    flags = ["--list"] if lists else []
    return subprocess.run([sys.executable, "-m", FOLDER, *flags, *names], cwd=clone(), check=False).returncode
