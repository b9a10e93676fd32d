"""The dial that ships inside the package: an adapter of the embedded model, assembled in the user's cache on first use.

- adapter.safetensors: what training changed, in half precision, of as low a rank as the package's size asks for
- adapter.json: how it is merged, see `ctrlray.adapter`
- dial.json: the job's control space, the level scales, where it comes from and what it measured
- card.md: the same in words
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
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
        assemble(asset(), target)
    return target


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
        if not target.exists():  # else another process was faster
            shutil.move(made, target)


def job_of(dial: dict[str, Any]) -> config.Job:
    """As much of the dial's job as an exported folder tells."""
    settings = {"name": NAME, "control": dial["control"], "export": dial["export"]}
    return config.parse(config.Job, settings, where=DIAL)
