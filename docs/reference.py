"""The reference pages, made while the site is built: commands from click, job files from their models, Python from docstrings.

Nothing of them is kept, so nothing of them can be out of date. Also refuses a site that would load anything from elsewhere.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import ctrlray
from ctrlray import config as jobs
from ctrlray.cli import main
from ctrlray.clusters import Prices
from ctrlray.rates import Rates
from ctrlray.rewards.job import RewardEvaluateJob, RewardTrainJob
from ctrlray.serve.policy import Policy
from ctrlray.serve.settings import ServeSettings
from ctrlray.sweep.plan import Sweep

PACKAGE = Path(ctrlray.__file__).parent
Schema = Mapping[str, Any]
_MOST = 60
"""Characters of a default that is shown in full; of a longer one its types and names."""
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_ELSEWHERE = r"""["']?(?:https?:)?//"""
_LOADED = re.compile(
    rf"<(?:script|img|iframe|source)[^>]+src={_ELSEWHERE}"
    rf"""|<link[^>]+rel=["']?(?:stylesheet|preconnect)["']?[^>]+href={_ELSEWHERE}"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    pages = {"commands": commands(), "job": job_file(), "files": other_files(), "python": python()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse pages that load scripts, styles, fonts or pictures from elsewhere."""
    for page in Path(config.site_dir).rglob("*.html"):
        if found := _LOADED.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.name} loads from elsewhere: {found[0]}")


def commands() -> str:
    """Every command with its options and examples."""
    made = ["# Commands", "", "What `ctrlray COMMAND --help` says. " + (main.help or "").split("\n\n")[1].replace("\n", " "), ""]
    return "\n".join([*made, *(line for name, c in _leaves(main, "ctrlray") for line in _command(name, c))])


def _leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _leaves(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def _command(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    rows = [record for p in command.params if isinstance(p, click.Option) and (record := p.get_help_record(context))]
    table = [f"| <code>{_cell(option)}</code> | {_cell(text)} |" for option, text in rows]
    options = ["| option | |", "|---|---|", *table, ""] if rows else []
    examples = getattr(command, "examples", "")
    shown = ["```console", examples, "```", ""] if examples else []
    return [f"## {name}", "", command.help or "", "", "```text", usage, "```", "", *options, *shown]


def job_file() -> str:
    """Every setting of a job file."""
    head = "What `ctrlray pipeline` and the stages read. `ctrlray config schema` prints the same as JSON for editors."
    return _models("Job file", head, [jobs.Job])


def other_files() -> str:
    """Every setting of the files that other commands read, without what they share with job files."""
    head = (
        "What `ctrlray reward train`, `ctrlray reward evaluate` and `ctrlray sweep` read, `ctrlray serve` with `--config` (or "
        "`--set`) and `--policy`, and `ctrlray plan` with `--rates` and `--prices`."
    )
    kinds = [RewardTrainJob, RewardEvaluateJob, Sweep, ServeSettings, Policy, Rates, Prices]
    return _models("Other files", head, kinds, known=_defined(jobs.Job))


def _models(title: str, head: str, kinds: list[type[jobs.Frozen]], known: Mapping[str, Schema] | None = None) -> str:
    there, lines = dict(known or {}), [f"# {title}", "", head, ""]
    every = there | {n: s for kind in kinds for n, s in _defined(kind).items()}
    for kind in kinds:
        for name, schema in _defined(kind).items():
            if name not in there and "properties" in schema:
                there[name] = schema
                lines += [f"## {name}", "", _words(schema), "", *_table(schema, every, frozenset(known or ())), ""]
    return "\n".join(lines)


def _defined(kind: type[jobs.Frozen]) -> dict[str, Schema]:
    """A model and those inside of it, by name; the outermost first."""
    whole = kind.model_json_schema()
    inner = whole.pop("$defs", {})
    return {kind.__name__: whole, **inner}


def _table(schema: Schema, every: Mapping[str, Schema], elsewhere: frozenset[str]) -> list[str]:
    rows = ["| setting | | value |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "**required**" if name in schema.get("required", ()) else f"default: {_default(field, every)}"
        kind = "" if "const" in field else f"{_kind(field, elsewhere)}<br>"
        rows.append(f"| `{name}` | {_cell(_words(field, every, own=True))} | {kind}{default} |")
    return rows


def _words(schema: Schema, every: Mapping[str, Schema] | None = None, own: bool = False) -> str:
    """A description; of a field without one that of its model's first line."""
    if own and "description" not in schema and "$ref" in schema and every:
        return str(every[_name(schema)].get("description", "")).split("\n")[0]
    return str(schema.get("description", ""))


def _kind(field: Schema, elsewhere: frozenset[str]) -> str:
    """What may stand there, in words."""
    if "$ref" in field:
        name = _name(field)
        page = "job.md" if name in elsewhere else ""
        return f"[{name}]({page}#{name.lower()})"
    if several := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(f, elsewhere) for f in several))
    if "const" in field or "enum" in field:
        return " or ".join(f"`{v}`" for v in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        fixed = field.get("prefixItems")
        return "list of " + (", ".join(_kind(f, elsewhere) for f in fixed) if fixed else _kind(field.get("items", {}), elsewhere))
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return "mapping" + (f" to {_kind(values, elsewhere)}" if isinstance(values, Mapping) else "")
    limits = " ".join(f"{sign} {field[key]:g}" for key, sign in _LIMITS.items() if key in field)
    return f"{field.get('type', 'anything').replace('null', 'unset')} {limits}".strip()


def _default(field: Schema, every: Mapping[str, Schema]) -> str:
    """A default as JSON; of a nested model only what differs from that model's own defaults."""
    value = field.get("default")
    if isinstance(value, dict) and "$ref" in field:
        own = every[_name(field)]["properties"]
        value = {k: v for k, v in value.items() if v != own[k].get("default") and not isinstance(v, dict | list)}
        return f"`{json.dumps(value)}`" if value else "its own"
    if len(json.dumps(value)) > _MOST:
        value = [_brief(item) for item in value] if isinstance(value, list) else _brief(value)
    return "unset" if value is None else f"`{json.dumps(value)}`"


def _brief(value: Any) -> Any:
    return {k: v for k, v in value.items() if k in ("type", "name")} if isinstance(value, dict) else value


def _name(field: Schema) -> str:
    return str(field["$ref"]).rsplit("/", 1)[1]


def _cell(text: str) -> str:
    return _text(" ".join(text.split())).replace("|", "&#124;")


def python() -> str:
    """Modules with what their docstrings say, and the stages' functions."""
    head = "Each module by its own words. The functions of `ctrlray.stages` are the stages themselves, over tables."
    lines = ["# Python", "", head, ""]
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("ctrlray", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if (text := ast.get_docstring(tree)) and not path.stem.startswith("__main"):
            lines += [f"## {name}", "", _paragraphs(text), "", *_members(tree), ""]
    return "\n".join(lines)


def _paragraphs(text: str) -> str:
    """A docstring as Markdown: paragraphs with drawings or code as they stand, the others as text."""
    parts = text.split("\n\n")
    drawn = [any(re.search(r"^ |\S {3,}\S", line) for line in part.splitlines()) for part in parts]
    return "\n\n".join(f"```text\n{p}\n```" if d else _text(p) for p, d in zip(parts, drawn, strict=True))


def _text(text: str) -> str:
    """What looks like a tag is text, but within backticks, where Markdown sees to that."""
    return "`".join(part if i % 2 else html.escape(part, quote=False) for i, part in enumerate(text.split("`")))


def _members(tree: ast.Module) -> list[str]:
    """Public functions and classes, with the first sentence of each."""
    found = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if text := ast.get_docstring(node):
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            first = " ".join(text.split("\n\n")[0].split())
            found.append(f"- `{node.name}{arguments}`: {_text(first)}")
    return found
