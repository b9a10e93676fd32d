"""What a job does to a cluster that does not exist yet: actors, nodes, memory, tokens per second and dollars by stage.

`placement` says what fits, `clusters` what is there, `rates` how fast it is; this puts them together and refuses what cannot
run. JSON values out; `planning_text` writes them as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ctrlray import config, estimate, memory, models, placement, rates
from ctrlray.clusters import GPU, PRICES, RAY_SHARE, Cluster, Launched, NodeType, Prices, launch, read_cluster, read_prices
from ctrlray.errors import ClusterError, ConfigError
from ctrlray.memory import Memory, Shape
from ctrlray.placement import GRADING, JUDGING, Group
from ctrlray.rates import Rate, Rates

DRIVER_S = 60.0
"""Assumed of a stage that runs in the driver."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Planner:
    """A job and the cluster that it is planned for."""

    job: config.Job
    cluster: Cluster
    prices: Prices
    rates: Rates
    shape: Shape
    rewards: Mapping[str, int]
    """Parameters of reward models by name."""

    def plan(self) -> Row:
        """Raises ClusterError, naming the smallest change, when the cluster cannot hold the job."""
        self._refuse()
        stages = list(self._stages())
        seconds = sum(s["seconds"] for s in stages if s["beside"] is None)
        return {
            "job": self.job.name,
            "cluster": self.cluster.name,
            "run_root": self.job.run_root,
            "parameters": self.shape.parameters,
            "prices": {"as_of": self.prices.as_of, "source": self.prices.source},
            "rates": self.rates.source,
            "phases": [self._phase(name) for name in self._launched],
            "memory": list(self._memory()),
            "stages": stages,
            "total": {"seconds": seconds, "dollars": sum(s["dollars"] for s in stages)},
            "assumptions": [*rates.ASSUMPTIONS, self._waits()],
        }

    def _waits(self) -> str:
        idle = f" and stay {self.cluster.idle_s:g} s idle after it" if self.cluster.idle_s else ""
        return f"a phase's nodes take {self.rates.start_s:g} s to come up{idle}, and are paid for"

    def _refuse(self) -> None:
        groups = placement.plan(self.job, self.shape, self.rewards)
        if problem := placement.misfit(self.job, groups, self.cluster.nodes(), self.shape, self.rewards):
            raise ClusterError(f"{self.cluster.name}: {problem}")
        head, needed = self.cluster.head.node, memory.preparing_gib(self.job, self.shape)
        if needed > head.memory_gib:
            raise ClusterError(
                f"{self.cluster.name}: the head prepares the model in {needed:.1f} GiB, and Ray gives {head.memory_gib:.1f} GiB "
                f"of its {head.memory_gib / RAY_SHARE:.0f}. The smallest change that fits: a head of {needed / RAY_SHARE:.0f} "
                "GiB."
            )

    @cached_property
    def _groups(self) -> dict[str, list[Group]]:
        """Actors by phase: pools at their largest, or at the least size where the largest does not come up."""
        found = {}
        sizes = [placement.phases(placement.plan(self.job, self.shape, self.rewards, least=least)) for least in (False, True)]
        for phase in sizes[0]:
            largest, least = sizes[0][phase], sizes[1][phase]
            found[phase] = least if isinstance(launch(self.cluster, largest), ConfigError) else largest
        return found

    @cached_property
    def _launched(self) -> dict[str, Launched]:
        made = {}
        for phase, groups in self._groups.items():
            nodes = launch(self.cluster, groups)
            if isinstance(nodes, ConfigError):
                raise ClusterError(f"{self.cluster.name}: {phase}: {nodes}") from nodes
            made[phase] = nodes
        return made

    def _phase(self, name: str) -> Row:
        groups, nodes = self._groups[name], self._launched[name]
        least = {g.operator: g.actors for g in placement.plan(self.job, self.shape, self.rewards) if g.phase == name}
        return {
            "phase": name,
            "stages": list(placement.STAGES_OF[name]),
            "actors": [_actors(g, least[g.operator]) for g in groups],
            "bundles": _counted([placement.bundle(g) for g in groups for _ in range(g.actors)]),
            "gpus": sum(g.actors * g.gpus for g in groups),
            "nodes": nodes.counts,
            "dollars_per_hour": self.cluster.head.dollars_per_hour + nodes.dollars_per_hour,
        }

    def _host(self, group: Group) -> NodeType:
        """The node type that runs a group's actors in its phase."""
        types = {t.name: t for t in self.cluster.workers}
        up = [types[name] for name in self._launched[group.phase].counts]
        return next(t for t in [*up, self.cluster.head] if placement.takes(t.node, group))

    def _gpu(self, group: Group) -> GPU | None:
        kind = self._host(group).gpu
        return self.prices.gpus[kind] if group.gpus and kind else None

    def _memory(self) -> Iterator[Row]:
        """What one process of each kind holds on its device, beside what the device has."""
        parts = {"engine": memory.engine(self.job, self.shape), "worker": memory.worker(self.job, self.shape)}
        for phase, groups in self._groups.items():
            for g in groups:
                if g.operator in parts and not (phase == "evaluate" and g.operator == "engine"):
                    yield self._held(g, parts[g.operator])
                elif g.operator.startswith(("reward", "judge")) and phase != GRADING:  # the same actors as beside generation
                    context = memory.CONTEXT_GIB if g.gpus else memory.REWARD_PROCESS_GIB
                    size = max(g.gpu_gib if g.gpus else g.memory_gib, context)
                    yield self._held(g, Memory(weights=size - context, process=context))

    def _held(self, group: Group, held: Memory) -> Row:
        host, on_gpu = self._host(group), group.gpus > 0
        has = host.node.gpu_gib if on_gpu else host.node.memory_gib
        row: Row = {"phase": group.phase, "operator": group.operator, "device": (host.gpu if on_gpu else None) or "host"}
        row |= {"node_type": host.name, **{k: round(v, 2) for k, v in held._asdict().items()}}
        row |= {"total": round(held.total, 2), "has": round(has, 1), "host_gib": round(group.memory_gib, 1)}
        if group.operator == "engine" and on_gpu:
            room = memory.engine_room(self.job, self.shape, has)
            row["cache_tokens"] = int(room * 2**30 / self.shape.cache_bytes(memory.width(self.job.model.dtype, gpu=True)))
        return row

    def _stages(self) -> Iterator[Row]:
        amounts = {e.stage: e for e in estimate.estimate(self.job, self.shape.parameters)}
        engines, scoring_s, basis = self._engines(), *self._scoring(amounts["generate"].rows)
        first = "generate and score"
        for name in ("prompts", "generate", "score", "distill", "train", "evaluate", "export", "report"):
            amount = amounts.get(name, estimate.Estimate(name, 0, 0, None))
            row: Row = {"stage": name, "rows": amount.rows, "tokens": amount.tokens, "tokens_per_s": None, "beside": None}
            if name == "generate":
                tokens_per_s = engines.per_s * self._count(first, "engine")
                seconds = max(amount.tokens / tokens_per_s, scoring_s)
                row |= {"tokens_per_s": tokens_per_s, "basis": engines.basis}
                yield self._priced(row, seconds + self.rates.start_s, first)
            elif name == "score":
                yield row | {"seconds": scoring_s, "basis": basis, "dollars": 0.0, "beside": "generate"}
            elif name == "train":
                yield self._training(row)
            elif name == "evaluate":
                yield self._evaluation(row, engines, amounts["generate"].rows)
            else:
                yield self._priced(row | {"basis": "assumed"}, DRIVER_S, None)

    def _priced(self, row: Row, seconds: float, phase: str | None, *, last: bool = True) -> Row:
        """Of a phase that runs so long: its nodes are paid for until they have been idle long enough to go down.

        They do not where it is not the `last` that takes them, and the next one does at once.
        """
        up_s = seconds + self.cluster.idle_s if seconds and last else seconds
        workers = self._launched[phase].dollars_per_hour if phase else 0.0
        return row | {"seconds": seconds, "dollars": (seconds * self.cluster.head.dollars_per_hour + up_s * workers) / 3600}

    def _count(self, phase: str, operator: str) -> int:
        return sum(g.actors for g in self._groups[phase] if g.operator == operator)

    def _engines(self) -> Rate:
        (group,) = (g for g in self._groups["generate and score"] if g.operator == "engine")
        return rates.decoding(self.job, self.shape, self._gpu(group), self.rates)

    def _scoring(self, rows: int, phase: str = "generate and score") -> tuple[float, str]:
        """Seconds that the slowest reward of a phase, or the slowest judge, takes for so many answers, and its rate's basis."""
        slowest, basis = 0.0, ""
        groups = [g for g in self._groups[phase] if g.operator.startswith(("reward", "judge"))]
        for group, reward in zip(groups, self.job.judges if phase == JUDGING else self.job.teachers, strict=True):
            found = rates.scoring(self.job, self.rewards.get(getattr(reward, "model", ""), 0), self._gpu(group), self.rates)
            seconds = rows / (found.per_s * group.actors)
            if seconds >= slowest:
                slowest, basis = seconds, found.basis
        return slowest, basis

    def _evaluation(self, row: Row, engines: Rate, pool: int) -> Row:
        """The grid is sampled, then scored; then judges, if any, score it, the sampled answers, and some of PPO's rollouts."""
        tokens_per_s = engines.per_s * self._count("evaluate", "engine")
        row |= {"tokens_per_s": tokens_per_s, "basis": engines.basis}
        sampled = self._priced(row, row["tokens"] / tokens_per_s + self.rates.start_s, "evaluate")
        scored_s = self._scoring(row["rows"], GRADING)[0] + self.rates.start_s
        made = _sum(sampled, self._priced(row, scored_s, GRADING, last=not self.job.judges))
        if not self.job.judges:
            return made
        reinforced = any(isinstance(o, config.PPO) for o in self.job.train.objectives)
        rows = row["rows"] + pool + (self.job.evaluate.judged_rollouts if reinforced else 0)
        more = self._priced(row, self._scoring(rows, JUDGING)[0] + self.rates.start_s, JUDGING)
        return _sum(made, more)

    def _training(self, row: Row) -> Row:
        """Likelihood objectives in the phase `train`; PPO, if any, with its engines and rewards up beside the workers."""
        (group,) = self._groups["train"]
        rate = rates.training(self.job, self.shape, self._gpu(group), self.rates)
        tokens_per_s = rate.per_s * group.actors
        row |= {"tokens_per_s": tokens_per_s, "basis": rate.basis}
        ppos = [estimate.reinforced(o) for o in self.job.train.objectives if isinstance(o, config.PPO)]
        learned = row["tokens"] - sum(p.trained for p in ppos)
        made = self._priced(row, learned / tokens_per_s + (self.rates.start_s if learned else 0.0), "train", last=not ppos)
        for p in ppos:
            sampled = p.sampled / (self._engines().per_s * self._count("train ppo", "engine"))
            seconds = sampled + p.trained * p.passes / tokens_per_s + self._scoring(p.rollouts)[0] + self.rates.start_s
            made = _sum(made, self._priced(row, seconds, "train ppo"))
        return made


def plan(job: config.Job, cluster: Path, prices: Path | None = None, given: Path | None = None) -> Row:
    """A job planned for a cluster file; rates go by formula unless given, prices are those that ship with ctrlray.

    Raises ConfigError where a file or a model is not understood, ClusterError when the job does not fit.
    """
    facts = read_prices(prices or PRICES)
    shape, rewards = models.shape_from_hub(job.model), models.reward_parameters(job.rewards)
    speeds = rates.read_rates(given) if given else Rates()
    return Planner(job, read_cluster(cluster, facts), facts, speeds, shape, rewards).plan()


def _sum(one: Row, other: Row) -> Row:
    """A stage's row with what two of its phases take."""
    return one | {k: one[k] + other[k] for k in ("seconds", "dollars")}


def _actors(group: Group, least: int) -> Row:
    made = {"operator": group.operator, "least": least, "planned": group.actors, "cpus": group.cpus, "gpus": group.gpus}
    return made | {"nodes": group.nodes, "gpu_gib": round(group.gpu_gib, 1), "host_gib": round(group.memory_gib, 1)}


def _counted(bundles: Sequence[dict[str, float]]) -> list[Row]:
    """Equal bundles once, with their number."""
    distinct: list[dict[str, float]] = []
    for b in bundles:
        if b not in distinct:
            distinct.append(b)
    return [{"count": bundles.count(b), "bundle": b} for b in distinct]
