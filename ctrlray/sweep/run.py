"""Runs a sweep: shared stages once per distinct key, then every variant's own, and at the end the comparison.

    pools:     prompts ─► generate ─► score      once per key, sealed
    variants:  └─ copies, checked ─► distill ─► train ─► evaluate ─► export ─► report      one at a time, or as many as fit
    sweep:     comparison.json, .csv, .html

All of it goes on after a kill: pools and variants are runs, and the pipeline resumes those.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import yaml

from ctrlray import models, pipeline, placement
from ctrlray.errors import CtrlRayError
from ctrlray.lease import Lease, holder_of
from ctrlray.pipeline import STAGES, Run
from ctrlray.sweep import store
from ctrlray.sweep.children import Children
from ctrlray.sweep.plan import SHARED, Plan, slots
from ctrlray.tables import Storage

_RELEASE_S = 20.0
"""How long the processes of a sweep that was killed may take to be gone."""
Say = Callable[[str], None]


class Outcome(NamedTuple):
    """How a variant ended."""

    error: str
    """Empty when it finished."""
    seconds: float
    """Of this call; 0 when it had finished before."""


def run(plan: Plan, say: Say) -> dict[str, Outcome]:
    """Run whatever of the sweep is not finished. A variant that fails does not stop the others.

    Raises DataError when shared tables are not what they were, ConfigError while another process runs this sweep.
    """
    with Lease(plan.storage):
        file = yaml.safe_dump(plan.sweep.model_dump(mode="json"), sort_keys=False)
        plan.storage.write_bytes(file.encode(), "sweep.yaml")
        todo = [name for name in plan.jobs if not finished(plan.runs[name])]
        outcomes = {name: Outcome("", 0.0) for name in plan.jobs if name not in todo}
        say(f"sweep {plan.sweep.name}: {len(plan.jobs)} variants, {len(outcomes)} finished before; root {plan.storage.uri}")
        if todo:
            count, address = _room(plan, todo)
            with Children(say, address) as children:
                outcomes |= _pools(plan, todo, children, say)
                outcomes |= _variants(plan, [n for n in todo if n not in outcomes], children, count, say)
    return {name: outcomes[name] for name in plan.jobs}


def finished(run: Run) -> bool:
    """Whether every stage of a run is done."""
    return all(run.result(stage) is not None for stage in STAGES)


def _room(plan: Plan, todo: Sequence[str]) -> tuple[int, str | None]:
    """How many variants fit at the same time, and the address of a Ray started for them to meet in.

    None: they find the cluster's Ray themselves, or start one each when one variant runs at a time.
    """
    import ray

    if plan.sweep.parallel == 1:
        return 1, None
    jobs = [plan.jobs[name] for name in todo]
    pipeline.start_ray(jobs[0].cluster)
    shapes = {job.model: models.shape(models.resolve(job.model)) for job in jobs}
    plans = [placement.plan(job, shapes[job.model], models.known_reward_parameters(job.rewards)) for job in jobs]
    phases = [p for groups in plans for p in placement.phases(groups).values()]
    count = slots(phases, pipeline.nodes(), min(plan.sweep.parallel, len(todo)))
    if count > 1 and not (jobs[0].cluster.address or os.environ.get("RAY_ADDRESS")):
        return count, str(ray.get_runtime_context().gcs_address)
    ray.shutdown()
    return count, None


def _pools(plan: Plan, todo: Sequence[str], children: Children, say: Say) -> dict[str, Outcome]:
    """Run the shared stages that unfinished variants need; the outcomes of variants whose pool failed."""
    failed: dict[str, Outcome] = {}
    for pool in plan.pools:
        users = [u for u in pool.users if u in todo]
        if not users:
            continue
        shared = Run(pool.job)
        began = time.monotonic()
        if missing := [s for s in SHARED if shared.result(s) is None]:
            say(f"shared: {', '.join(missing)}, for {', '.join(users)}")
            error = _part("shared", pool.job, SHARED, shared.storage, children)
            if error is not None:
                failed |= {u: Outcome(f"shared tables: {error}", time.monotonic() - began) for u in users}
                continue
        store.seal(shared)
        for user in pool.users:
            if user not in todo:  # it finished before, maybe on answers that were deleted since
                store.take(shared, plan.runs[user])
    return failed


def _variants(plan: Plan, names: Sequence[str], children: Children, count: int, say: Say) -> dict[str, Outcome]:
    """Run variants, `count` at a time."""
    outcomes: dict[str, Outcome] = {}
    began, executor = time.monotonic(), ThreadPoolExecutor(count)
    try:
        waiting: dict[Future[Outcome], str] = {executor.submit(_variant, plan, n, children, say): n for n in names}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                name = waiting.pop(future)
                outcomes[name] = future.result()
                _tell(name, outcomes, len(names), time.monotonic() - began, say)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return outcomes


def _variant(plan: Plan, name: str, children: Children, say: Say) -> Outcome:
    began, current = time.monotonic(), plan.runs[name]
    shared = Run(plan.pool_of(name).job)
    taken = store.take(shared, current)
    where = f"{len(taken)} of {len(SHARED)} shared stages taken over" if taken else "shared stages are there, unchanged"
    say(f"{name}: {'; '.join(plan.changes(name)) or 'the base'} ({where})")
    error = _part(name, plan.jobs[name], STAGES, current.storage, children)
    return Outcome(error or "", time.monotonic() - began)


def _part(name: str, job: Any, stages: Sequence[str], storage: Storage, children: Children) -> str | None:
    """Run stages in a child, once nobody of a sweep that was killed writes there any more."""
    end = time.monotonic() + _RELEASE_S
    try:
        while holder_of(storage) is not None and time.monotonic() < end:
            time.sleep(0.2)
    except CtrlRayError as error:
        return str(error)
    return children.run(name, job, stages)


def _tell(name: str, outcomes: Mapping[str, Outcome], total: int, seconds: float, say: Say) -> None:
    left = seconds / len(outcomes) * (total - len(outcomes)) / 60
    how = "failed" if outcomes[name].error else "finished"
    rest = f"; about {left:.0f} minutes left" if left >= 1 else ""
    say(f"{name}: {how} after {outcomes[name].seconds / 60:.1f} minutes, {len(outcomes)} of {total}{rest}")
