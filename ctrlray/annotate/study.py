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
REWARD, JUDGE = "reward", "judge"
"""Who scored: what training saw, and the held-out judges."""
FOR_RATERS = "for_raters"


class Request(NamedTuple):
    """What a study should hold."""

    source: Source = "grid"
    methods: Sequence[str] = ()
    """Of the grid; the exported objective when empty."""
    prompts: str = ""
    """A set of the evaluation; the run's own held-out prompts when empty."""
    num_items: int = 60
    which: Which = "any"
    definitions: Mapping[str, str] = {}
    """By attribute, what raters are told that it means."""
    seed: int = 0


class Found(NamedTuple):
    """Answers to choose from, and the conversations that they answer, by prompt_id."""

    answers: list[Answer]
    chats: Mapping[str, Sequence[schema.Message]]


def export(run: Run, request: Request, out: Storage) -> list[str]:
    """Write the raters' files and the key; returns what to tell. Raises DataError when there is nothing to compare."""
    names = [a.name for a in run.job.control.attributes]
    if unknown := sorted(set(request.definitions) - set(names)):
        raise ConfigError(f"--define {unknown[0]}: no attribute of the control space, which has {names}")
    found = _grid(run, request.methods, request.prompts) if request.source == "grid" else _pool(run)
    drawn = draw_pairs(found.answers, request.num_items, request.seed, request.which, single=request.source == "grid")
    if not drawn.pairs:
        raise DataError(f"no two answers to one prompt can be compared; left out: {drawn.left_out or 'nothing'}")
    attributes = [(n, request.definitions.get(n) or f"The answer that shows more {n.replace('_', ' ')}.") for n in names]
    made = key.make_key(request.source, run.storage.uri, request.seed, attributes, drawn.pairs)
    items = [sheet.Item(p.item_id, found.chats[p.a.prompt_id], p.a.text, p.b.text) for p in drawn.pairs]
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


def _grid(run: Run, methods: Sequence[str], prompt_set: str) -> Found:
    """Evaluated answers to the run's own held-out prompts, or to those of a set."""
    from ctrlray.stages.sets import FOLDER

    names = [a.name for a in run.job.control.attributes]
    if run.result("evaluate") is None:
        raise ConfigError("the run has no finished evaluation; run `ctrlray evaluate` first, or take --source pool")
    sets = [s.name for s in run.job.evaluate.sets]
    if prompt_set and prompt_set not in sets:
        raise ConfigError(f"--prompts {prompt_set}: no set of the evaluation, which has {sets or 'none'}")
    out = run.out("evaluate").sub(FOLDER, prompt_set) if prompt_set else run.out("evaluate")
    prompts = out.read_table("prompts", schema.SET_PROMPTS) if prompt_set else run.prompts("eval")
    judged = bool(run.job.judges)
    rows = out.read_table("grid", schema.grid(names, judged=judged)).to_pylist()
    wanted = set(methods) or {run.job.export.objective or run.job.train.objectives[-1].type}
    if unknown := sorted(wanted - {r["method"] for r in rows}):
        raise ConfigError(f"--method {unknown[0]}: the grid has {sorted({r['method'] for r in rows})}")
    scorers = {REWARD: "score_"} | ({JUDGE: "judge_score_"} if judged else {})
    return Found(
        [
            Answer(
                r["grid_id"],
                r["prompt_id"],
                r["method"],
                tuple(r[f"requested_{n}"] for n in names),
                r["text"],
                {who: {n: r[prefix + n] for n in names} for who, prefix in scorers.items()},
            )
            for r in rows
            if r["method"] in wanted
        ],
        {p["prompt_id"]: p["messages"] for p in prompts.to_pylist()},
    )


def _pool(run: Run) -> Found:
    """The training examples with the levels that they were labelled with; an evaluation with judges has scored them too."""
    from ctrlray.stages import judging
    from ctrlray.stages.grid import text_id

    names = [a.name for a in run.job.control.attributes]
    if run.result("distill") is None:
        raise ConfigError("the run has no finished distillation; run `ctrlray distill` first")
    scored = schema.scores(names)
    rewards = {r["response_id"]: r for r in run.out("score").read_table("scores", scored).to_pylist()}
    judges = {r["response_id"]: r for r in run.out("evaluate").sub(judging.FOLDER).read_table("scores", scored).to_pylist()}
    columns = ["example_id", "prompt_id", "messages", "response", *(f"level_{n}" for n in names)]
    rows = run.out("distill").read_table("examples", schema.examples(names), columns).to_pylist()
    found = []
    for r in rows:
        by = {REWARD: rewards[r["example_id"]], JUDGE: judges.get(text_id(r["prompt_id"], r["response"].strip()))}
        scores = {who: {n: s[f"score_{n}"] for n in names} for who, s in by.items() if s}
        levels = tuple(r[f"level_{n}"] for n in names)
        found.append(Answer(r["example_id"], r["prompt_id"], POOL, levels, r["response"], scores))
    return Found(found, {r["prompt_id"]: r["messages"] for r in rows})


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
