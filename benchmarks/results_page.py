"""The section of docs/results.md about every method, out of benchmarks/results/results.json: no number or verdict by hand.

python -m benchmarks.results_page
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from ctrlray.stages.report_numbers import bounds, duration, number, percent, point

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
STORED = RESULTS / "results.json"
MARKS = ("<!-- methods:begin -->", "<!-- methods:end -->")
NAMES = {
    "start": "start model",
    "prompting": "prompting",
    "reranking": "reranking",
    "clm": "CLM",
    "exmate": "ExMATE",
    "ppo": "PPO",
}
"""In the page's order."""
ORDERING = (("ppo", "exmate"), ("exmate", "clm"), ("clm", "prompting"))
"""The paper's: the first of each is at least as good as the second (arXiv 2404.01295)."""
ALPHA = 0.05
SEEDS = "### Training seeds one by one"
HIGHER = {"pairwise": True, "mae": False}
WORDS = {"pairwise": "pairwise order", "mae": "control error"}
HEAD = """## Every method on the same prompts

```console
export CTRLRAY_DATA=/data                                      # holds hh/ and prompts/
python -m benchmarks.results --root /data/ctrlray-results      # runs jobs/results, resumes when interrupted
python -m benchmarks.results_page                              # this section again, out of the stored JSON
```
"""
Results = Mapping[str, Any]


def section(results: Results | None) -> str:
    """Everything between the markers; what to run where nothing was measured yet."""
    if results is None:
        return f"{HEAD}\nNot measured yet.\n"
    parts = [
        HEAD.strip(),
        _setting(results),
        "### Targets",
        _targets(results["figures"]),
        *(_attribute(results, name) for name in results["shape"]["attributes"]),
        *([SEEDS, _seeds(results)] if len(results["seeds"]) > 1 else []),
        "### Beside the dials",
        _beside(results),
        "### What an answer costs, and how far a method went from the base",
        _costs(results),
        "### The paper's ordering",
        _ordering(results),
        "### Seconds and tokens by stage",
        _stages(results),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(results: Results) -> str:
    shape, machine = results["shape"], results["machine"]
    dials = " and ".join(f"{name} at {levels} levels" for name, levels in shape["attributes"].items())
    seeds = ", ".join(f"{NAMES[m]} {n}" for m, n in _ordered(shape["seeds"]).items() if n > 1)
    sampled = "greedily" if shape["temperature"] == 0 else f"at temperature {shape['temperature']:g}"
    correlation = "; ".join(f"{n} {shown(c['within_prompt'])}" for n, c in results["correlation"].items())
    return (
        f"Model `{shape['model']}`, {dials}. {shape['train_prompts']} prompts for training with {shape['samples']} answers each, "
        f"{shape['eval_prompts']} held out at all {shape['cells']} settings, answered {sampled}; reranking chooses among "
        f"{shape['candidates']} answers. Brackets are 95% bootstrap intervals over prompts; every method answers the same ones. "
        f"Training seeds: {seeds or 'one each'}{', the others one' if seeds else ''}. Intervals are over prompts alone; how "
        f"much seeds differ is shown beside them. The judge is another model on other labels; its correlation with the training "
        f"reward within a prompt: {correlation}.\n\n"
        f"Run at commit {results['run_commit']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory']}."
    )


def _targets(figures: Sequence[Mapping[str, Any]]) -> str:
    rows = [[f["name"], f["target"], _figure(f), "met" if f["met"] else "**not met**"] for f in figures]
    met = sum(bool(f["met"]) for f in figures)
    return markdown_table(("ExMATE", "asked", "measured", ""), rows) + f"\n\n{met} of {len(figures)} are met."


def _figure(figure: Mapping[str, Any]) -> str:
    spread = figure["spread"] or [None, None]
    return shown({"value": figure["measured"], "low": spread[0], "high": spread[1]}, 3)


def _attribute(results: Results, name: str) -> str:
    """One dial under every method."""
    own, judge = (results["metrics"][regime] for regime in ("training reward", "judge"))
    names = list(results["shape"]["attributes"])
    i = names.index(name)
    others = [other for other in names if other != name]
    header = (
        "",
        "Spearman over level means",
        "pairwise order",
        "pairwise order, judge",
        "length partialled out",
        "length partialled out, judge",
        "control error (MAE)",
        "bias",
        *(f"slope of {o}" for o in others),
    )
    rows = []
    for method, found in _ordered(own).items():
        values = found["attributes"][name]
        seen = judge[method]["attributes"][name] if method in judge else {}
        cells = [values["spearman_level_means"], values["pairwise"], seen.get("pairwise"), values["pairwise_length_adjusted"]]
        cells += [seen.get("pairwise_length_adjusted"), values["mae"], values["bias"]]
        rows.append([NAMES[method], *map(shown, cells), *(shown(found["slopes"][i][names.index(o)]) for o in others)])
    pool = [results["pool_slopes"][i][names.index(o)] for o in others]
    rows.append(["data pool", *[""] * 7, *map(shown, pool)])
    note = (
        "Under the training reward where nothing else is said. Pairwise order is 0.5 by chance; with length partialled out, all "
        "that an answer's length could explain is taken away first. Control error and bias are in levels; a slope says how far "
        "the other attribute moves for a level of this dial, 0 at best."
    )
    return f"### The {name} dial\n\n{note}\n\n{markdown_table(header, rows)}"


def _costs(results: Results) -> str:
    own = _ordered(results["metrics"]["training reward"])
    rows = []
    for method, found in own.items():
        spent = number(results["tokens_per_request"].get(method), 1)
        kl = results["kl_base"].get(method)
        size = number(found["mean_tokens"], 1)
        rows.append([NAMES[method], spent, size, percent(found["finished"]), shown(kl, 1) if kl else "–"])
    greedy = results["shape"]["temperature"] == 0
    drift = "log-probability over the base's" if greedy else "KL to the base"
    header = ("", "tokens spent on an answer", "its length in tokens", "finished", f"{drift}, nats per answer")
    text = (
        "The last column is the mean over answers of their log-probability under the method with its code, minus that under the "
        "base without one"
        + (
            ". The answers are greedy ones, so that this is how much likelier training made what a method says first, and no KL "
            "in the strict sense."
            if greedy
            else ", an unbiased estimate of the KL where the temperature is 1 and nothing is cut off."
        )
    )
    text += (
        " Tokens that cutting an answer back to its last sentence removed are not counted: of reranking's candidates, which are "
        "cut back, more were sampled."
    )
    return f"{markdown_table(header, rows)}\n\n{text}"


def _seeds(results: Results) -> str:
    """What each training seed gives by itself, of the methods that have several."""
    seeds, names = results["seeds"], list(results["shape"]["attributes"])
    several = [m for m, n in _ordered(results["shape"]["seeds"]).items() if n > 1]
    header = ("", *(f"{name}: {what}" for name in names for what in ("Spearman", "pairwise order", "judge")))
    rows = []
    for method in several:
        for seed, found in seeds.items():
            cells = []
            for name in names:
                own, judge = (found[regime][method][name] for regime in ("training reward", "judge"))
                cells += [own["spearman_level_means"], own["pairwise"], judge["pairwise"]]
            rows.append([f"{NAMES[method]}, {seed}", *(number(c, 2) for c in cells)])
    return markdown_table(header, rows)


def _beside(results: Results) -> str:
    """What dials do beside what they are asked for."""
    own, to_pool = results["metrics"]["training reward"], results["entanglement_to_pool"]
    names = list(results["shape"]["attributes"])
    header = ("", "entanglement, the pool's = 1", "hypervolume", *(f"CoSA, {n} kept" for n in names))
    header += ("refusals", "distinct-2", "repetition")
    rows = []
    for method, found in _ordered(own).items():
        cells = [to_pool[method], found["pareto"]["hypervolume"], *(found["cosa"].get(n) for n in names)]
        cells += [found["texts"][k] for k in ("refused", "distinct_2", "repetition")]
        rows.append([NAMES[method], *map(shown, cells)])
    text = (
        "Entanglement is how far a dial moves the other attributes for what it moves its own, beside how far they go together "
        "among sampled answers. Hypervolume is that of the cells' mean shares of the pool, from the pool's worst answer; CoSA "
        "scores are the other attributes' share where the kept one is as asked for, negative where it is not. Under the training "
        "reward."
    )
    return "\n\n".join([text, markdown_table(header, rows), *([_hacking(results["hacking"])] if results["hacking"] else [])])


def _hacking(found: Mapping[str, Any]) -> str:
    """Whether PPO's training reward and the judge came apart."""
    lines = []
    for method, course in found.items():
        moved = "".join(
            f" From steps {c['from'][0]} to {c['from'][1]} to the last third, the training reward changed by "
            f"{shown(c['reward'])} levels, the judge's by {shown(c['judge'])}."
            for c in course["changes"]
        )
        word = "came apart: **alarm**" if course["alarm"] else "did not come apart"
        lines.append(f"{NAMES[method]}: training reward and judge {word} ({course['rule']}).{moved}")
    return "\n\n".join(lines)


def _ordering(results: Results) -> str:
    """A line for each step of the ordering, by the corrected paired tests alone."""
    lines = [
        "The paper has PPO at least as good as ExMATE, ExMATE as CLM, CLM as prompting. Each step is held against the paired "
        "differences in pairwise order and control error, for both attributes and in both regimes: a difference counts where its "
        "permutation test over prompts has p < 0.05 after Holm's correction over all pairs of methods and attributes."
    ]
    if "ppo" in results["shape"]["seeds"] and len(results["seeds"]) > 1:
        lines[0] += (
            " PPO has one seed, and is held against the one ExMATE that it started from; the tables' ExMATE is the mean of all "
            "seeds."
        )
    lines += [_step(results, better, worse) for better, worse in ORDERING]
    lines.append(_reranking(results))
    return "\n\n".join([lines[0], "\n".join(lines[1:])])


def differences(results: Results, first: str, second: str) -> dict[str, list[str]]:
    """What sets two methods apart, in words, by which of the two is better: `first`, `second` or `neither`."""
    found: dict[str, list[str]] = {"first": [], "second": [], "neither": []}
    for regime, tests in results["comparisons"].items():
        for c in tests:
            if {c["first"], c["second"]} != {first, second}:
                continue
            sign = 1 if (c["first"] == first) == HIGHER[c["statistic"]] else -1
            better = "first" if sign * c["value"] > 0 else "second"
            side = better if c["p_holm"] < ALPHA else "neither"
            found[side].append(f"{c['attribute']}'s {WORDS[c['statistic']]} by the {regime}")
    return found


def verdict(found: Mapping[str, Sequence[str]]) -> str:
    """One word on a step, of what `differences` found."""
    if not any(found.values()):
        return "not measured"
    if found["first"] and found["second"]:
        return "mixed"
    if found["second"]:
        return "not reproduced"
    return "reproduced" if found["first"] else "neither shown nor contradicted"


def _step(results: Results, first: str, second: str) -> str:
    found = differences(results, first, second)
    named = f"{NAMES[first]} ≥ {NAMES[second]}"
    return f"- {named}: **{verdict(found)}**. {_sides(found, NAMES[first], NAMES[second])}".rstrip()


def _sides(found: Mapping[str, Sequence[str]], first: str, second: str) -> str:
    total = sum(map(len, found.values()))
    words = {"first": f"{first} is better in", "second": f"{second} is better in", "neither": "No difference is shown in"}
    told = [f"{text} {len(found[s])} of {total}: {'; '.join(found[s])}." for s, text in words.items() if found[s]]
    return " ".join(told)


def _reranking(results: Results) -> str:
    """The costly baseline: is it costlier, and is the dial as good?"""
    spent, found = results["tokens_per_request"], differences(results, "exmate", "reranking")
    if not {"exmate", "reranking"} <= spent.keys() or not any(found.values()):
        return "- Reranking as the costly baseline: **not measured**."
    ratio = spent["reranking"] / spent["exmate"]
    if ratio <= 1 or found["second"]:
        word = "not reproduced"
    else:
        word = "reproduced" if found["first"] else "costlier, and neither is shown to be better"
    cost = f"Reranking spends {number(ratio, 1)} times ExMATE's tokens on an answer."
    named = "Reranking is costlier than ExMATE and no better"
    return f"- {named}: **{word}**. {cost} {_sides(found, 'ExMATE', 'reranking')}"


def _stages(results: Results) -> str:
    rows = []
    for run, found in results["stages"].items():
        for stage, took in found.items():
            tokens = number(took["tokens"]) if took["tokens"] is not None else "–"
            rows.append([run, stage, duration(took["seconds"]), tokens, number(took["rows"])])
    seconds = sum(took["seconds"] for found in results["stages"].values() for took in found.values())
    trained = "; ".join(
        f"{NAMES[m]} {facts['steps']} steps in {duration(facts['seconds'])}" for m, facts in _ordered(results["training"]).items()
    )
    table = markdown_table(("run", "stage", "time", "tokens", "rows"), rows)
    return f"{table}\n\nIn all {duration(seconds)}. Training in the first run: {trained}."


def _ordered(methods: Mapping[str, Any]) -> dict[str, Any]:
    return {m: methods[m] for m in NAMES if m in methods}


def shown(value: Any, digits: int = 2) -> str:
    """`0.71 [0.64, 0.78]`."""
    return f"{number(point(value), digits)} {bounds(value, digits)}".strip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def placed(page: str, text: str, marks: tuple[str, str] = MARKS) -> str:
    """The page with a section between its markers. Raises ValueError where it has none."""
    begin, end = marks
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{text}{end}", page)


def stored() -> Results | None:
    """The results, None where nothing was measured."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else None


def write() -> Path:
    """The section anew."""
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), section(stored())), encoding="utf-8")
    return PAGE


if __name__ == "__main__":
    print(write())
