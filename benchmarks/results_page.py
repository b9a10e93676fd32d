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
from ctrlray.stages.report_numbers import bounds, duration, number, outside, percent, point

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
STORED = RESULTS / "results.json"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
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
    correlation = "; ".join(f"{n} {_shown(c['within_prompt'])}" for n, c in results["correlation"].items())
    return (
        f"Model `{shape['model']}`, {dials}. {shape['train_prompts']} prompts for training with {shape['samples']} answers each, "
        f"{shape['eval_prompts']} held out at all {shape['cells']} settings, answered {sampled}; reranking chooses among "
        f"{shape['candidates']} answers. Brackets are 95% bootstrap intervals over prompts; every method answers the same ones. "
        f"Training seeds: {seeds or 'one each'}{', the others one' if seeds else ''}. The judge is another model on other "
        f"labels; its correlation with the training reward within a prompt: {correlation}.\n\n"
        f"Commit {results['commit']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory']}."
    )


def _targets(figures: Sequence[Mapping[str, Any]]) -> str:
    rows = [[f["name"], f["target"], _figure(f), "met" if f["met"] else "**not met**"] for f in figures]
    met = sum(bool(f["met"]) for f in figures)
    return _table(("ExMATE", "asked", "measured", ""), rows) + f"\n\n{met} of {len(figures)} are met."


def _figure(figure: Mapping[str, Any]) -> str:
    spread = figure["spread"] or [None, None]
    return _shown({"value": figure["measured"], "low": spread[0], "high": spread[1]}, 3)


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
        "control error (MAE)",
        "bias",
        *(f"slope of {o}" for o in others),
    )
    rows = []
    for method, found in _ordered(own).items():
        values = found["attributes"][name]
        seen = judge[method]["attributes"][name]["pairwise"] if method in judge else None
        cells = [values["spearman_level_means"], values["pairwise"], seen, values["mae"], values["bias"]]
        rows.append([NAMES[method], *map(_shown, cells), *(_shown(found["slopes"][i][names.index(o)]) for o in others)])
    pool = [results["pool_slopes"][i][names.index(o)] for o in others]
    rows.append(["data pool", *[""] * 5, *map(_shown, pool)])
    note = (
        "Under the training reward where nothing else is said. Pairwise order is 0.5 by chance, control error and bias are in "
        "levels; a slope says how far the other attribute moves for a level of this dial, 0 at best."
    )
    return f"### The {name} dial\n\n{note}\n\n{_table(header, rows)}"


def _costs(results: Results) -> str:
    own = _ordered(results["metrics"]["training reward"])
    rows = []
    for method, found in own.items():
        spent = number(results["tokens_per_request"].get(method), 1)
        kl = results["kl_base"].get(method)
        size = number(found["mean_tokens"], 1)
        rows.append([NAMES[method], spent, size, percent(found["finished"]), _shown(kl, 1) if kl else "–"])
    header = ("", "tokens spent on an answer", "its length in tokens", "finished", "KL to the base, nats per answer")
    text = (
        "KL: mean over answers of their log-probability under the method with its code, minus that under the base without one. "
        "Baselines are the base."
    )
    return f"{_table(header, rows)}\n\n{text}"


def _ordering(results: Results) -> str:
    """A line for each step of the ordering, by the intervals of the paired differences alone."""
    lines = [
        "The paper has PPO at least as good as ExMATE, ExMATE as CLM, CLM as prompting. Each step is held against the paired "
        "differences in pairwise order and control error, for both attributes and in both regimes: a difference counts where its "
        "95% interval over prompts leaves out 0. Each interval stands alone; of many, some leave out 0 by chance."
    ]
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
            side = {1: "first", -1: "second", 0: "neither"}[sign * outside(c, 0.0)]
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
    word = "reproduced" if ratio > 1 and not found["second"] else "not reproduced"
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
    table = _table(("run", "stage", "time", "tokens", "rows"), rows)
    return f"{table}\n\nIn all {duration(seconds)}. Training in the first run: {trained}."


def _ordered(methods: Mapping[str, Any]) -> dict[str, Any]:
    return {m: methods[m] for m in NAMES if m in methods}


def _shown(value: Any, digits: int = 2) -> str:
    """`0.71 [0.64, 0.78]`."""
    return f"{number(point(value), digits)} {bounds(value, digits)}".strip()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def placed(page: str, text: str) -> str:
    """The page with a section between its markers. Raises ValueError where it has none."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{text}{END}", page)


def stored() -> Results | None:
    """The results, None where nothing was measured."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else None


def write() -> Path:
    """The section anew."""
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), section(stored())), encoding="utf-8")
    return PAGE


if __name__ == "__main__":
    print(write())
