"""The dial that ships inside the package: an adapter of the embedded model, assembled in the user's cache on first use.

- adapter.safetensors: what training changed, in half precision, of as low a rank as the package's size asks for
- adapter.json: how it is merged, see `ctrlray.adapter`
- dial.json: the job's control space, the level scales, where it comes from and what it measured
- card.md: the same in words
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ctrlray import config, models
from ctrlray.adapter import ADAPTER, ADAPTER_CARD, merge
from ctrlray.control import ControlSpace
from ctrlray.errors import ConfigError
from ctrlray.schema import digest
from ctrlray.stages import export

NAME = "demo"
DIAL = "dial.json"
_LOOK_UP = "from vllm import ModelRegistry; ModelRegistry.models['LlamaForCausalLM'].inspect_model_cls()"
FILES = (ADAPTER, ADAPTER_CARD, DIAL)


def asset() -> Path:
    """The shipped folder."""
    return Path(str(resources.files("ctrlray") / "assets" / NAME))


def ready() -> bool:
    """Whether the shipped dial was assembled before."""
    return _place().is_dir()


def folder() -> Path:
    """The shipped dial as an exported model folder; assembled once for each version of it."""
    target = _place()
    if not target.is_dir():
        with _architecture_looked_up():
            assemble(asset(), target)
    return target


@contextlib.contextmanager
def _architecture_looked_up() -> Iterator[None]:
    """Have vLLM look up what the architecture can do, once per machine, which takes as long as making the dial does."""
    process = subprocess.Popen([sys.executable, "-c", _LOOK_UP], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):  # then the engine looks it up itself
            process.wait(60)
    finally:
        process.kill()
        process.wait()


def _place() -> Path:
    """In the user's cache, by what the shipped files hold; the last part is the model's name in the API."""
    hashes = [hashlib.sha256((asset() / f).read_bytes()).hexdigest() for f in FILES]
    return config.cache_home() / "demo" / digest(*hashes) / NAME


def assemble(source: Path, target: Path) -> None:
    """Merge the adapter of a folder like the shipped one into the prepared embedded model, as a folder to serve.

    Raises ConfigError when the adapter is of another control space than the folder says.
    """
    dial = json.loads((source / DIAL).read_text())
    job = job_of(dial)
    base = models.prepare(job.model, ControlSpace.of(job.control))
    if list(base.control_ids) != json.loads((source / ADAPTER_CARD).read_text())["control_ids"]:
        raise ConfigError(f"{source}: its adapter's control tokens are not those of its {DIAL}; make it anew from its run")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        merge(base.folder, str(source), str(made))
        export.finish(str(made), base, job, dial["method"], dial["figures"])
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(target)
    if not target.is_dir():
        raise ConfigError(f"{target}: the demo dial could not be put there; make room or set XDG_CACHE_HOME")


def job_of(dial: dict[str, Any]) -> config.Job:
    """As much of the dial's job as an exported folder tells."""
    settings = {"name": NAME, "control": dial["control"], "export": dial["export"]}
    return config.parse(config.Job, settings, where=DIAL)
