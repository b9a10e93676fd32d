"""What a job reads beside its settings, each by a name and a hash: prompt files, model folders, heads, the source of functions.

A changed input redoes what a changed setting would. What is not here, such as a hub's, counts by its name alone. Nothing of it
is imported or fetched.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import NamedTuple

from ctrlray import config, models
from ctrlray.errors import ConfigError
from ctrlray.schema import digest


class Input(NamedTuple):
    """One thing that a job reads."""

    name: str
    """As the manifest has it: `reward my_rewards:brevity`."""
    hash: Callable[[], str]
    """16 hex digits of its content; empty when it is not here. Raises ConfigError for a prompt file that is gone."""


class Hashes:
    """Hashes of inputs, each taken once: a run has one key, whatever is written to its inputs meanwhile."""

    def __init__(self, noted: Mapping[str, str], as_noted: bool) -> None:
        """`noted` is what the run said of them last; `as_noted`: rather that than what is there now."""
        self._noted, self._as_noted = noted, as_noted
        self._found: dict[str, str] = {}

    def of(self, read: Input | None) -> str:
        """Hash of what is there, of what was there where it is gone since; empty for what counts by its name."""
        if read is None:
            return ""
        if read.name not in self._found:
            self._found[read.name] = self._take(read)
        return self._found[read.name]

    def _take(self, read: Input) -> str:
        noted = self._noted.get(read.name)
        if self._as_noted and noted is not None:
            return noted
        try:
            return read.hash() or noted or ""
        except ConfigError:
            if noted is None:
                raise
            return noted


def of_prompts(source: config.PromptSource) -> Input | None:
    """A prompt file; None for what counts by its name."""
    from ctrlray.stages.prompts import benchmark, expand

    file = benchmark(source) if isinstance(source, config.BenchmarkPrompts) else source
    if not isinstance(file, config.FilePrompts | config.HHPrompts):
        return None
    name = getattr(source, "path", None) or getattr(source, "name", None) or source.type
    return Input(str(name), lambda: _hashed(expand(file.path)))


def of_model(model: config.Model) -> Input:
    """A model folder, by its weights: new ones in an old place are seen."""
    return Input(f"model {model.name}", lambda: models.fingerprint(path, "model.name") if (path := _folder(model.name)) else "")


def of_critic(setting: str, name: str) -> Input:
    """The folder of a model that a critic starts from, by its weights; `setting` names it in errors."""
    return Input(f"critic {name}", lambda: models.fingerprint(path, setting) if (path := _folder(name)) else "")


def of_reward(reward: config.Reward) -> Input | None:
    """A function's module, a heads file or a classifier's folder; None for rewards of which nothing is read."""
    if isinstance(reward, config.FunctionReward):
        target = reward.target
        return Input(f"reward {target}", lambda: _hashed(path) if (path := source_file(target)) else "")
    if isinstance(reward, config.HFReward):
        model = reward.model
        return Input(f"reward {model}", lambda: _classifier(path) if (path := _folder(model)) else "")
    if heads := getattr(reward, "heads", None):
        return Input(f"reward {heads}", lambda: _hashed(path) if (path := Path(heads)).is_file() else "")
    return None


def source_file(target: str) -> Path | None:
    """The file of a function's module, `package.module:function`, found where reward actors look: in this folder first.

    Neither the module nor a package that it is in is imported.
    """
    first, *rest = target.partition(":")[0].split(".")
    importlib.invalidate_caches()  # of folders that were listed before the file came
    for spec in (PathFinder.find_spec(first, [os.getcwd()]), _known(first)):
        found = spec
        for part in rest:
            inside = found.submodule_search_locations if found else None
            found = PathFinder.find_spec(part, list(inside)) if inside else None
        if found and found.origin and Path(found.origin).is_file():
            return Path(found.origin)
    return None


def _known(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module of that name was made by hand
        return None


def _hashed(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{path}: cannot be read ({why}); make it readable, or correct the path") from error


def _classifier(folder: Path) -> str:
    """A reward's weights, and the small files that decide its scores too: the units of its logits, how text becomes tokens."""
    small = [f for f in sorted(folder.iterdir()) if f.name == "config.json" or f.name.startswith("tokenizer")]
    return digest(models.fingerprint(folder), [[f.name, _hashed(f)] for f in small])


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if name != models.EMBEDDED and path.is_dir() else None
