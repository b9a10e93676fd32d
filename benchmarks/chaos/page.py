"""docs/reliability.md and the stored figures, out of the trials' outcomes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.plan import DRIVER, KINDS, TRIALS
from benchmarks.common import RESULTS, figure, middle

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
STORED = RESULTS / "chaos.json"
Outcome = Mapping[str, Any]
HEAD = """# Reliability

Generated from `benchmarks/results/chaos.json`.

Each trial runs a small pipeline and kills one process of it with `kill -9` in the midst of its work: the victim is stopped, its
live work is looked up (rows noted as in flight, a batch in hand, an unfinished training step), and only then is it killed. The
run then recovers by itself, or the same command is given again. At the end its tables must be those of a run that nothing
disturbed, to the bit: prompts, responses, scores, examples, what was left out and the scales of levels; or PPO's rollouts, the
adapter, its losses and code gaps; or the evaluation grid, the log-probs behind its KL, its metrics and comparisons. A run that
hangs for 400 seconds counts as one that did not recover. A trial goes on from the undisturbed run's stages before the kill and
stops behind the stages that the kill can reach, whose tables are all that the others read; where a driver is killed that
generates, it ends with the grid.

**The engines are simulated**: an answer follows from a hash of its request and of the weights in force, so that every run must
agree, and an engine that came back with other weights would show. They answer in a child process, as vLLM's do on GPUs. All
else is real: Ray's actors, nodes and raylets, Ray Data, Ray Train and DeepSpeed, on a random model of two layers. Only
`benchmarks/chaos/driver.py` puts such engines into a run; no setting of a job can. Kills on real vLLM engines are in
`tests/e2e/test_killed.py`, `test_engine_death.py` and `test_ppo.py`.

```console
python -m benchmarks.chaos --root DIR
```
"""
FOUND = """## What was found and mended

- **A process that was taken for dead and yet lived** could write its answers after another had been given its rows. Where the
  successor had cut the batch up, both stood in the table; accounts count ids and did not see it, and an example could be made of
  an answer other than the one that was scored. Now whoever takes over a batch puts their name on its notes, a new run erases
  them, and an engine looks at its note before it writes: one whose rows are another's ends itself.
- **A table that holds a row twice** passed as whole. Generation and scoring now end with a check that every id is there once.
- **A block that was lost with its node** and made again could hold its rows in another order, and be written a second time under
  another name. Answers now leave an engine in the order in which they were asked for.
- **A node taken away from engines that evaluate or that PPO samples with** ended the run, which a rerun mended: the cluster did
  not know yet, and put the engine's replacement on that node. One that ends before it is up is now replaced in its turn. Both
  trials of that kind were made again afterwards.
"""


def good(outcome: Outcome) -> bool:
    """Whether a trial ended as an undisturbed run does."""
    whole = outcome["lost"] == 0 and outcome["twice"] == 0 and outcome["unequal"] == [] and outcome["unaccounted"] == []
    return bool(outcome["recovered"]) and whole


def figures(outcomes: Sequence[Outcome], trials: int = TRIALS) -> list[dict[str, Any]]:
    """What those of `trials` come to that have an outcome."""
    ended = [o for o in outcomes if o["recovered"]]
    lost, twice = sum(o["lost"] for o in ended), sum(o["twice"] for o in ended)
    equal, back = sum(map(good, outcomes)), len(ended)
    spared = [o for o in outcomes if not o["kind"].startswith(DRIVER)]
    alone = sum(o["recovered"] == "itself" for o in spared)
    seconds, spread = middle([o["seconds_lost"] for o in ended]) if ended else (None, None)
    by_itself = "trials that went on by themselves, of those whose driver lived"
    return [
        figure("trials that recovered, by themselves or by a rerun", f"all of {trials}", back, back == trials),
        figure(by_itself, f"all of {len(spared)}", alone, alone == len(spared)),
        figure("rows lost", "0", lost, lost == 0),
        figure("rows duplicated", "0", twice, twice == 0),
        figure("trials whose tables equal the undisturbed run's in full", f"all of {trials}", equal, equal == trials),
        figure("seconds lost to a kill", "recorded", seconds, None, spread),
    ]


def page(stored: Mapping[str, Any]) -> str:
    """The page of stored results."""
    outcomes: Sequence[Outcome] = stored["outcomes"]
    head = ("killed", "trials", "recovered by itself", "by a rerun", "rows lost", "rows duplicated", "tables equal")
    lines = [HEAD, *_row((*head, "median seconds lost")), _rule(len(head) + 1)]
    for kind in KINDS:
        if mine := [o for o in outcomes if o["kind"] == kind]:
            lines += _row(_summary(kind, mine))
    lines += _row(_summary("**all**", outcomes))
    if len(outcomes) < TRIALS:
        lines += ["", f"{len(outcomes)} of {TRIALS} trials have been made so far."]
    machine = stored["machine"]
    commits, cpus = (", ".join(sorted({o[what] for o in outcomes})) for what in ("commit", "cpu"))
    lines += [
        "",
        "Seconds lost are those beyond an undisturbed run of the same stages. The machine was shared with other work, so single",
        "trials say little. A rerun pays the start of Ray again; the loss of a node is noticed after three seconds here, sooner",
        "than by Ray's defaults.",
        "",
        FOUND,
        "## Every trial",
        "",
        *_row(("", "killed", "in", "live work that it held", "exit codes", "recovered", "equal")),
        _rule(7),
    ]
    for o in outcomes:
        where = o["stage"] + (f" ({o['method']})" if o["stage"] == "train" else "")
        codes, same = ", ".join(map(str, o["codes"])), "yes" if good(o) else f"**no**: {_wrong(o)}"
        lines += _row((o["trial"], o["kind"], where, o["work"], codes, o["recovered"] or "**no**", same))
    lines += ["", f"Commit {commits}; {cpus}, {machine['cores']} cores, {machine['memory']}.", ""]
    return "\n".join(lines)


def _summary(name: str, outcomes: Sequence[Outcome]) -> tuple[object, ...]:
    ended = [o for o in outcomes if o["recovered"]]
    alone = sum(o["recovered"] == "itself" for o in outcomes)
    lost, twice = sum(o["lost"] for o in ended), sum(o["twice"] for o in ended)
    seconds = f"{statistics.median(o['seconds_lost'] for o in ended):.1f}" if ended else ""
    return (name, len(outcomes), alone, len(ended) - alone, lost, twice, sum(map(good, outcomes)), seconds)


def _wrong(outcome: Outcome) -> str:
    if not outcome["recovered"]:
        return "it did not recover"
    return ", ".join([*outcome["unequal"], *(f"accounts of {s}" for s in outcome["unaccounted"])])


def _row(cells: Sequence[object]) -> list[str]:
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"]


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def write() -> None:
    """The page anew, of what is stored."""
    PAGE.write_text(page(json.loads(STORED.read_text())), encoding="utf-8")
