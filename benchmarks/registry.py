"""Which benchmarks `ctrlray bench` knows: what each compares, what it needs of a machine, where its figures are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
MIN_CORES, MIN_GIB = 2, 12


class Benchmark(NamedTuple):
    """One script and its peer."""

    name: str
    """Also the name of its stored results, `results/<name>.json`."""
    title: str
    against: str
    """The peer, in words; empty where the figure is a share of the whole."""
    minutes: int
    """On two cores, about."""
    arguments: tuple[str, ...] = ()
    module: str = ""
    """Of `benchmarks`; its name when empty."""
    package: str = ""
    """Distribution that the peer comes from, where ctrlray itself does not depend on it."""
    gpu: bool = False

    @property
    def command(self) -> list[str]:
        """What Python is called with."""
        return ["-m", f"benchmarks.{self.module or self.name}", *self.arguments]

    @property
    def exists(self) -> bool:
        """Whether its script is in this checkout; it is listed only then."""
        return (FOLDER / f"{self.module or self.name}.py").is_file()


ALL = (
    Benchmark("generation", "Generation", "plain vLLM `LLM.generate`, and transformers `generate`", 20),
    Benchmark("scoring", "Scoring", "a loop over transformers and numpy", 8),
    Benchmark("training", "Training", "TRL's SFTTrainer", 30, package="trl"),
    Benchmark("training_gpu", "Training on a GPU", "the FLOP/s of a matmul", 3, ("--gpu",), module="training", gpu=True),
    Benchmark("ppo", "PPO", "TRL's GRPOTrainer", 20, package="trl"),
    Benchmark("serve", "Serving", "plain vLLM's server", 15),
    Benchmark("pipeline", "The whole pipeline", "", 13),
    Benchmark("scale", "Scale, by simulation", "", 20),
)


def lacks(benchmark: Benchmark) -> str:
    """What this machine lacks for a benchmark, with the next step; empty when nothing."""
    if benchmark.package and not _installed(benchmark.package):
        return f"its peer {benchmark.package} is not installed; `uv pip install --group benchmark`"
    if benchmark.gpu and not list(Path("/proc/driver/nvidia/gpus").glob("*")):
        return "no NVIDIA GPU"
    cores, gib = os.cpu_count() or 1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if cores < MIN_CORES or gib < MIN_GIB:
        return f"{cores} cores and {gib:.0f} GiB; it wants {MIN_CORES} and {MIN_GIB}"
    return ""


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name; all that this checkout has when none is named. Raises ValueError for a name that is none."""
    known = {b.name: b for b in ALL if b.exists}
    if odd := [n for n in names if n not in known]:
        raise ValueError(f"no benchmark {odd[0]!r}; there are {', '.join(known)}")
    return [known[n] for n in names] if names else list(known.values())


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
