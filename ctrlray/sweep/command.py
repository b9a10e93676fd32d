"""What `ctrlray sweep` prints and writes around a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from ctrlray.config import Job
from ctrlray.estimate import estimate
from ctrlray.pipeline import Run
from ctrlray.sweep.plan import OWN, SHARED, Plan, StagePlan, load
from ctrlray.sweep.run import Say, run

PAGE, CSV, JSON = "comparison.html", "comparison.csv", "comparison.json"


def sweep(path: Path, overrides: Sequence[str], say: Say) -> bool:
    """Run a sweep and write its comparison; whether every variant finished."""
    from ctrlray.sweep.compare import compare
    from ctrlray.sweep.page import csv_text, lines, render

    plan = load(path, overrides)
    outcomes = run(plan, say)
    found = compare(plan, outcomes)
    plan.storage.write_json(found, JSON)
    plan.storage.write_bytes(csv_text(found).encode(), CSV)
    plan.storage.write_bytes(render(found).encode(), PAGE)
    for line in ["", *lines(found), "", f"page    {plan.storage.uri}/{PAGE}", f"table   {plan.storage.uri}/{CSV}"]:
        say(line)
    return not any(o.error for o in outcomes.values())


def describe(plan: Plan) -> list[str]:
    """What a sweep would do: what is shared among whom, and what each variant does itself, why, and for how long."""
    said = [f"sweep {plan.sweep.name}: {len(plan.jobs)} variants; root {plan.storage.uri}", ""]
    total = 0.0
    for pool in plan.pools:
        shared = Run(pool.job)
        minutes = _minutes(pool.job, [s for s in SHARED if shared.result(s) is None])
        total += minutes
        users = "all variants" if len(pool.users) == len(plan.jobs) else ", ".join(pool.users)
        said.append(f"shared by {users}{_cost(minutes)}")
        said += [f"    {s:<9} {shared.keys[s]}  {shared.state(s)}" for s in SHARED]
    for name, job in plan.jobs.items():
        current = plan.runs[name]
        minutes = _minutes(job, [s for s in OWN if current.result(s) is None])
        total += minutes
        said += ["", f"{name}{_cost(minutes)}", *(f"    {change}" for change in plan.changes(name))]
        for kind in (True, False):
            told = itertools.groupby((s for s in plan.stages(name) if s.shared == kind), _told)
            said.append(f"    {'shared' if kind else 'own':<9} {'; '.join(f'{_names(stages)}: {how}' for how, stages in told)}")
    return [*said, "", f"at most {total:.0f} minutes on 2 cores, one variant at a time"]


def _names(stages: Iterable[StagePlan]) -> str:
    return ", ".join(s.stage for s in stages)


def _told(stage: StagePlan) -> str:
    """`finished`, or why it is to be done and what is there of it already."""
    if stage.state == "finished":
        return stage.state
    why = "new input" if stage.why.startswith("follows") else stage.why
    waits = stage.state == "never ran" or stage.state.startswith("follows")
    return why if waits else f"{why}, {stage.state}"


def _minutes(job: Job, stages: Sequence[str]) -> float:
    return sum(row.minutes or 0.0 for row in estimate(job) if row.stage in stages)


def _cost(minutes: float) -> str:
    return f": at most {minutes:.1f} minutes on 2 cores" if minutes else ": nothing to do"
