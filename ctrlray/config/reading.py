"""YAML in, settings out; a mistake is named by its field, its value and the next step."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ctrlray.config.base import Frozen, T
from ctrlray.config.job import Job
from ctrlray.errors import ConfigError

QUICKSTART = "quickstart"


def packaged_jobs() -> dict[str, Path]:
    """Job files that ship inside the package, by name."""
    folder = resources.files("ctrlray") / "assets" / "jobs"
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if str(f).endswith(".yaml")}


def load_job(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Job:
    """Read a job: a YAML file, the name of a packaged job, or the quickstart when `source` is None.

    `overrides` are `a.b=c` assignments; values are YAML. Raises ConfigError with field, value and next step.
    """
    path = find_job(source or QUICKSTART)
    return parse(Job, read_job(path, overrides), where=str(path))


def read_job(path: Path, overrides: Sequence[str] = (), what: str = "job file") -> dict[str, Any]:
    """A settings file's content with `overrides` (`a.b=c`) in it, not yet checked; errors call the file `what`."""
    try:
        raw = _load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the {what} {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of settings, got {type(raw).__name__}")
    for assignment in overrides:
        assign(raw, assignment)
    return raw


def _load(text: str) -> Any:
    """What a YAML text says. Raises YAMLError, whatever is wrong with it."""
    try:
        return yaml.load(text, _UniqueKeys)
    except (ArithmeticError, RecursionError, ValueError) as error:  # as PyYAML's scanner and deep nesting raise
        raise yaml.YAMLError(str(error)) from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: by itself the last one would win in silence."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Name the place of a value such as 2024-99-99: PyYAML lets through what Python says of it."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise yaml.constructor.ConstructorError(None, None, f"this value cannot be read: {error}", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what is there twice. Keys that are no scalars are refused by PyYAML itself."""
        seen: set[str] = set()
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if isinstance(node, yaml.MappingNode) else []
        for key in scalars:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice; keep one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def setting_names(kind: type[Frozen] = Job, path: str = "") -> list[str]:
    """Dotted names of all settings that one value can be given to: `train.epochs`, `generate.pool.cpus`."""
    found = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and not isinstance(inner, types.GenericAlias) and issubclass(inner, Frozen)
        found += setting_names(inner, f"{path}{name}.") if nested else [f"{path}{name}"]  # type: ignore[arg-type]
    return found


def parse(kind: type[T], raw: Mapping[str, Any], *, where: str) -> T:
    """Validate `raw` as `kind`; every problem becomes one line of a single ConfigError."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = [dict(problem) for problem in error.errors(include_url=False)]
        lines = [_explain(kind, raw, problem) for problem in problems if not _follows(problem, problems)]
        raise ConfigError(f"{where}:\n  " + "\n  ".join(lines)) from None


def find_job(source: str | Path) -> Path:
    """The file of a packaged job, or the path itself; ConfigError when there is neither."""
    packaged = packaged_jobs()
    if str(source) in packaged:
        return packaged[str(source)]
    path = Path(source).expanduser()
    if not path.is_file():
        hint = difflib.get_close_matches(str(source), packaged, 1)
        raise ConfigError(
            f"no job file at {str(source)!r}; give a path, or a packaged job: {', '.join(sorted(packaged))}"
            + (f" (did you mean {hint[0]!r}?)" if hint else "")
        )
    return path


def assign(raw: dict[str, Any], assignment: str) -> None:
    """Put one `a.b=c` into a job's settings; ConfigError where it has no place."""
    key, sep, text = assignment.partition("=")
    if not sep or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"--set {assignment!r}: write it as a.b=value, for example train.epochs=3")
    try:
        value = _load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not YAML ({' '.join(str(error).split())}); quote or close it") from error
    put(raw, key, value, f"--set {key}")


def put(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put a value at `a.b` of a job's settings; ConfigError, which begins with `where`, when there is no such place."""
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = _descend(node, part, where)
    if isinstance(node, list):
        node[_index(node, last, where)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"{where}: {'.'.join(parents)} is not a mapping; set it as a whole")


def _index(node: list[Any], part: str, where: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"{where}: {part!r} is no place in a list of {len(node)}, counted from 0; set the list as a whole")
    return int(part)


def _descend(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, where)]
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: {part!r} lies under a value that is not a mapping")
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _explain(kind: type[Frozen], raw: Mapping[str, Any], problem: dict[str, Any]) -> str:
    location = [str(p) for p in problem["loc"]]
    field = ".".join(_written(raw, problem)) or "job"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        close = difflib.get_close_matches(location[-1], known, 1)
        return f"{field}: unknown key" + (f"; did you mean {close[0]!r}?" if close else ".") + f" Known: {', '.join(known)}"
    message, given = problem["msg"].removeprefix("Value error, "), problem.get("input")
    if problem["type"] == "union_tag_invalid" and isinstance(given, Mapping):
        field, message, given = f"{field}.type", f"Input should be one of {problem['ctx']['expected_tags']}", given["type"]
    return f"{field}: {message}" + ("" if problem["type"] == "value_error" else f" (got {_shown(given)[:120]})")


def _shown(given: Any) -> str:
    try:
        return json.dumps(given, default=str)
    except (TypeError, ValueError, RecursionError):  # a date as a key, or an alias of what it stands in
        return repr(given)


def _follows(problem: dict[str, Any], problems: Sequence[dict[str, Any]]) -> bool:
    """Whether a list is only too short because its items are wrong, which is said already."""
    at = problem["loc"]
    return problem["type"] == "too_short" and any(p["loc"][: len(at)] == at for p in problems if p is not problem)


def _written(raw: Any, problem: dict[str, Any]) -> list[str]:
    """Where a problem lies as the file and `--set` spell it: without the types of settings that pydantic puts between."""
    found, node, tag = [], raw, None
    for part in problem["loc"]:
        if part == tag:
            tag = None
        elif part in (node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list) else ()):
            node = node[part]
            tag = node.get("type") if isinstance(node, Mapping) else None
            found.append(str(part))
    return [*found, str(problem["loc"][-1])] if problem["type"] == "missing" else found


def _known_keys(kind: type[Frozen], location: Sequence[str]) -> list[str]:
    """Field names of the model that `location` points at, through tuples, unions and tags."""
    candidates: list[type[Frozen]] = [kind]
    for part in location:
        tagged = [c for c in candidates if "type" in c.model_fields and c.model_fields["type"].default == part]
        if tagged:
            candidates = tagged
        elif not part.isdigit():
            fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
            candidates = [m for f in fields for m in _models_in(f.annotation)]
    return sorted({name for c in candidates for name in c.model_fields})


def _models_in(annotation: Any) -> list[type[Frozen]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Frozen):
        return [annotation]
    return [m for a in typing.get_args(annotation) for m in _models_in(a)]
