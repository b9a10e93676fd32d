"""One choice of the method at a time: `jobs/ablation` at its full size into `results/ablation.json` and docs/results.md.

The sweep runs whole in a process of its own under `--root`, resumed when interrupted.

    python -m benchmarks.ablation --root /data/ctrlray-ablation
    python -m benchmarks.ablation          # the section of docs/results.md again, out of the stored JSON
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, figure, store
from benchmarks.results_page import PAGE, markdown_table, placed, shown
from ctrlray.stages.report_numbers import number
from ctrlray.sweep.command import JSON
from ctrlray.sweep.plan import load

SWEEP = Path(__file__).parent.parent / "jobs" / "ablation" / "sweep.yaml"
STORED = RESULTS / "ablation.json"
MARKS = ("<!-- ablation:begin -->", "<!-- ablation:end -->")
ALPHA = 0.05
HEAD = """## One choice of the method at a time

```console
python -m benchmarks.ablation --root /data/ctrlray-ablation    # runs jobs/ablation, resumes when interrupted
```
"""
Comparison = Mapping[str, Any]


def figures(found: Comparison) -> list[dict[str, Any]]:
    """Per variant and attribute: how well the dial's two ends are told apart, minus the base's; no target is set."""
    made = []
    for variant in found["variants"]:
        for name, values in variant["attributes"].items():
            apart = values["ends"].get("difference")
            value, against = (apart, f" minus {found['base']}'s") if apart else (values["ends"], "")
            title = f"{variant['variant']}: {name}, order accuracy of lowest against highest{against}"
            spread = [round(value["low"], 4), round(value["high"], 4)]
            made.append(figure(title, "no target", round(value["value"], 4), None, spread))
    return made


def section(stored: Mapping[str, Any] | None) -> str:
    """Everything between the markers; what to run where nothing was measured yet."""
    if stored is None:
        return f"{HEAD}\nNot measured yet.\n"
    found = stored["comparison"]
    names = list(dict.fromkeys(a for v in found["variants"] for a in v["attributes"]))
    return (
        "\n\n".join([HEAD.strip(), _setting(stored), _overview(found), *(_attribute(found, n) for n in names), _verdict(found)])
        + "\n"
    )


def _setting(stored: Mapping[str, Any]) -> str:
    machine, shape = stored["machine"], stored["shape"]
    return (
        f"The base is ExMATE on {shape['train']} prompts with {shape['samples']} answers each, {shape['examples']} examples in "
        f"balanced level cells, wrong codes as counterfactuals, w = 1, three levels, control tokens. Each variant changes what "
        f"its name says, on the same answers and scores; {shape['eval']} prompts are held out. One seed each. Brackets are 95% "
        f"bootstrap intervals over prompts, differences are paired; those in bold have p < {ALPHA:g} by a permutation test over "
        "prompts after Holm's correction over all variants and attributes.\n\n"
        f"Run at commit {stored['run_commit']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory']}."
    )


def _overview(found: Comparison) -> str:
    header = ("variant", "differs from the base in", "examples", "held-out code gap, nats per token", "tokens per answer")
    rows = []
    for v in found["variants"]:
        apart = "; ".join(v["changes"]) or "nothing"
        if v["state"] == "failed":
            rows.append([v["variant"], apart, "**failed**", "", ""])
        else:
            cells = [number(v["examples"]), shown(v["code_gap"], 3), number(v["mean_tokens"], 1)]
            rows.append([v["variant"], apart, *cells])
    return markdown_table(header, rows)


def _attribute(found: Comparison, name: str) -> str:
    base = found["base"]
    header = (
        name,
        "lowest against highest",
        f"difference to {base}",
        "pairwise order",
        f"difference to {base}",
        "slope of its own dial",
    )
    rows = [
        [v["variant"], *(cell for key in ("ends", "pairwise") for cell in _pair(values[key])), shown(values["slope"])]
        for v in found["variants"]
        if (values := v["attributes"].get(name))
    ]
    return markdown_table(header, rows)


def _pair(value: Mapping[str, Any]) -> list[str]:
    apart = value.get("difference")
    said = shown(apart, 3) if apart else ""
    return [shown(value), f"**{said}**" if apart and apart.get("p_holm", 1.0) < ALPHA else said]


def _verdict(found: Comparison) -> str:
    """What the tests say, and no more."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for v in found["variants"]:
        for name, values in v["attributes"].items():
            apart = values["ends"].get("difference")
            if apart and apart["p_holm"] < ALPHA:
                sides[apart["value"] > 0].append(f"{v['variant']} in {name}")
    words = ((True, "Better"), (False, "Worse"))
    told = [f"{word} than the base: {'; '.join(sides[better])}." for better, word in words if sides[better]]
    return (
        f"By how well the dial's ends are told apart. {' '.join(told)}"
        if told
        else "No variant's ends are told apart better or worse than the base's."
    )


def write() -> Path:
    """The section anew."""
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else None
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), section(stored), MARKS), encoding="utf-8")
    return PAGE


def main() -> None:
    """Run, store, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    root = parser.parse_args().root
    if root:
        sets = [f"run_root={root.resolve()}"]
        subprocess.run([sys.executable, "-m", "ctrlray", "sweep", str(SWEEP), "--set", *sets], check=True)
        plan = load(SWEEP, sets)
        found, job = plan.storage.read_json(JSON), plan.jobs[plan.base]
        shape = {"train": job.prompts.train, "eval": job.prompts.eval, "samples": job.generate.samples}
        shape["examples"] = next(v["examples"] for v in found["variants"] if v["variant"] == plan.base)
        found.pop("root")
        for variant in found["variants"]:
            variant.pop("root")
        made_at = plan.runs[plan.base].storage.read_json("manifest.json")["commit"]
        print(store("ablation", figures(found), run_commit=made_at, shape=shape, comparison=found))
    print(write())


if __name__ == "__main__":
    main()
