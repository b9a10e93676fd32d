"""A study, from a run's tables to files for raters and from their files to results.

    grid or training rows ─► for_raters/study.html, for_raters/study.csv, key.json
    key.json + raters' files ─► agreement.json, agreement.md, ratings.csv, quarantine.csv

The key stays with whoever runs the study.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ctrlray import config, schema
from ctrlray.annotate import answers, key, results, sheet
from ctrlray.annotate.pairs import Answer, Drawn, Which, draw_pairs
from ctrlray.errors import ConfigError, DataError
from ctrlray.tables import Storage

if TYPE_CHECKING:
    from ctrlray.pipeline import Run

Source = Literal["grid", "pool"]
POOL = "pool"
REWARD = "reward"
"""The scorer that training saw."""
FOR_RATERS = "for_raters"


class Request(NamedTuple):
    """What a study should hold."""

    source: Source = "grid"
    methods: Sequence[str] = ()
    """Of the grid; the exported objective when empty."""
    num_items: int = 60
    which: Which = "any"
    definitions: Mapping[str, str] = {}
    """By attribute, what raters are told that it means."""
    seed: int = 0


def export(run: Run, request: Request, out: Storage) -> list[str]:
    """Write the raters' files and the key; returns what to tell. Raises DataError when there is nothing to compare."""
    names = [a.name for a in run.job.control.attributes]
    if unknown := sorted(set(request.definitions) - set(names)):
        raise ConfigError(f"--define {unknown[0]}: no attribute of the control space, which has {names}")
    found = _grid(run, request.methods) if request.source == "grid" else _pool(run)
    drawn = draw_pairs(found, request.num_items, request.seed, request.which, single=request.source == "grid")
    if not drawn.pairs:
        raise DataError(f"no two answers to one prompt can be compared; left out: {drawn.left_out or 'nothing'}")
    attributes = [(n, request.definitions.get(n) or f"The answer that shows more {n.replace('_', ' ')}.") for n in names]
    made = key.make_key(request.source, run.storage.uri, request.seed, attributes, drawn.pairs)
    chats = {p["prompt_id"]: p["messages"] for split in ("train", "eval") for p in run.prompts(split).to_pylist()}
    items = [sheet.Item(p.item_id, chats[p.a.prompt_id], p.a.text, p.b.text) for p in drawn.pairs]
    blind = sheet.Sheet(made["study"], attributes, items)
    raters = out.sub(FOR_RATERS)
    raters.write_bytes(sheet.page(blind).encode(), "study.html")
    raters.write_bytes(sheet.sheet_csv(blind).encode("utf-8-sig"), "study.csv")  # the mark has Excel read UTF-8
    out.write_json(made, "key.json")
    return _told(made["study"], drawn, request, out)


def _told(study: str, drawn: Drawn, request: Request, out: Storage) -> list[str]:
    few = f", {request.num_items} were asked for" if len(drawn.pairs) < request.num_items else ""
    prompts = len({p.a.prompt_id for p in drawn.pairs})
    lines = [f"study {study}: {len(drawn.pairs)} pairs of {prompts} prompts, out of {drawn.num_contrasts}{few}"]
    lines += [f"left out: {n} {reason}" for reason, n in drawn.left_out.items()]
    return [*lines, f"give raters   {out.uri}/{FOR_RATERS}", f"keep          {out.uri}/key.json"]


def _grid(run: Run, methods: Sequence[str]) -> list[Answer]:
    names = [a.name for a in run.job.control.attributes]
    if run.result("evaluate") is None:
        raise ConfigError("the run has no finished evaluation; run `ctrlray evaluate` first, or take --source pool")
    wanted = set(methods) or {run.job.export.objective or run.job.train.objectives[-1].type}
    rows = run.out("evaluate").read_table("grid", schema.grid(names)).to_pylist()
    if unknown := sorted(wanted - {r["method"] for r in rows}):
        raise ConfigError(f"--method {unknown[0]}: the grid has {sorted({r['method'] for r in rows})}")
    return [
        Answer(
            r["grid_id"],
            r["prompt_id"],
            r["method"],
            tuple(r[f"requested_{n}"] for n in names),
            r["text"],
            {REWARD: {n: r[f"score_{n}"] for n in names}},
        )
        for r in rows
        if r["method"] in wanted
    ]


def _pool(run: Run) -> list[Answer]:
    """The training examples with the levels that they were labelled with."""
    names = [a.name for a in run.job.control.attributes]
    if run.result("distill") is None:
        raise ConfigError("the run has no finished distillation; run `ctrlray distill` first")
    scores = {r["response_id"]: r for r in run.out("score").read_table("scores", schema.scores(names)).to_pylist()}
    columns = ["example_id", "prompt_id", "response", *(f"level_{n}" for n in names)]
    rows = run.out("distill").read_table("examples", schema.examples(names), columns).to_pylist()
    return [
        Answer(
            r["example_id"],
            r["prompt_id"],
            POOL,
            tuple(r[f"level_{n}"] for n in names),
            r["response"],
            {REWARD: {n: scores[r["example_id"]][f"score_{n}"] for n in names}},
        )
        for r in rows
    ]


def located(run_or_job: str) -> Run:
    """The run of a job file, or the run of that name, path or URI."""
    from ctrlray import runs
    from ctrlray.pipeline import Run

    if run_or_job.endswith((".yaml", ".yml")):
        return Run(config.load_job(run_or_job))
    return Run.at(runs.locate(run_or_job))


def import_ratings(key_file: Path, files: Sequence[Path], out: Storage, num_bootstrap: int) -> str:
    """Read and check raters' files, write what they found beside each other; returns the results as text."""
    try:
        raw = json.loads(key_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the key {key_file}: {error}") from error
    made = key.check_key(raw, str(key_file))
    checked = answers.check([g for file in files for g in answers.read(file)], made)
    out.write_bytes(answers.quarantine_csv(checked).encode(), "quarantine.csv")
    ratings = sheet.csv_text([answers.Rating._fields, *sorted([*checked.used, *checked.skipped])])
    out.write_bytes(ratings.encode(), "ratings.csv")
    found = results.results(made, checked, num_bootstrap, int(made["seed"]))
    said = results.text(found)
    out.write_json(found, "agreement.json")
    out.write_bytes(said.encode(), "agreement.md")
    return said


def definitions(pairs: Sequence[str]) -> dict[str, str]:
    """`["safety=Does no harm."]` -> `{"safety": "Does no harm."}`. Raises ConfigError for what is not written so."""
    found: dict[str, Any] = {}
    for text in pairs:
        name, sep, meaning = text.partition("=")
        if not sep or not meaning.strip():
            raise ConfigError(f'--define {text!r}: write it as NAME="what it means"')
        found[name.strip()] = meaning.strip()
    return found
