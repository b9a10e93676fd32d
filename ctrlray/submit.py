"""A job on a cluster through Ray's job server: sent with its file, followed, left alone, stopped, sent again.

A run root names a run, and one job at most writes to it: submitting again follows the job that runs, or goes on with what the
last one left. Nothing but the job file and what `working_dir` holds travels; ctrlray itself is in the cluster's image.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ctrlray import config
from ctrlray.errors import ClusterError, ConfigError
from ctrlray.quiet import use_ray_token
from ctrlray.schema import digest

DETACHED, STOPPED = 130, 143
"""Exit codes of a follower that was interrupted, and of a job that was stopped."""
JOB_FILE = "ctrlray-job.yaml"
_ROOT, _DIGEST = "ctrlray_run_root", "ctrlray_job"
_LEFT_OUT = (".git", ".venv", "__pycache__", "*.egg-info")
_STOP_S, _POLL_S, _AWAY_S = 60.0, 0.5, 120.0
Say = Callable[[str], None]


class Cluster:
    """A cluster's job server. All of it raises ClusterError where none answers."""

    def __init__(self, address: str | None) -> None:
        use_ray_token()
        import aiohttp
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        self._lost = (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError)
        """What Ray's client raises where a server is not there, refuses, or goes away."""
        try:
            self._client = JobSubmissionClient(address)
        except (*self._lost, ValueError) as error:
            raise ClusterError(
                f"no job server at {address or 'the address in RAY_ADDRESS'}: {_first_line(error)}. Give --address "
                "http://HEAD:8265, with `ray dashboard cluster.yaml` or a port-forward running where the head is not reached "
                "directly"
            ) from error

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._lost as error:
            raise ClusterError(f"the job server did not {what}: {_first_line(error)}. Jobs that run are not touched") from error

    def running(self, root: str) -> Any:
        """Details of the job that writes to a run root; None when there is none."""
        with self._asking("list its jobs"):
            jobs = [j for j in self._client.list_jobs() if (j.metadata or {}).get(_ROOT) == root]
        return next((j for j in jobs if not j.status.is_terminal()), None)

    def send(self, job: config.Job, restarts: int, working_dir: Path | None, runtime_env: Mapping[str, Any]) -> str:
        """Upload and start a job; its submission id."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "job"
            _pack(job, folder, working_dir)
            with self._asking("take the job"):
                sent: str = self._client.submit_job(
                    entrypoint=shlex.join(["python", "-m", "ctrlray", "pipeline", JOB_FILE, "--restarts", str(restarts)]),
                    submission_id=f"{job.name}-{stamp}-{secrets.token_hex(2)}",
                    runtime_env={**runtime_env, "working_dir": str(folder)},
                    metadata={_ROOT: job.root, _DIGEST: _digest(job)},
                )
        return sent

    def follow(self, submission: str, write: Say) -> int:
        """Write a job's log as it comes, to its end; the exit code of its driver.

        A server that is lost is looked for again. Raises ClusterError when it stays away.
        """
        log, said, seen = _Log(self._client, submission, write), "", time.monotonic()
        while True:
            try:
                details = self._client.get_job_info(submission)
                if details.status.is_terminal():
                    return exit_code(details)
                seen = time.monotonic()
                asyncio.run(log.tail())
            except self._lost as error:  # the job may well go on
                if time.monotonic() - seen > _AWAY_S:
                    raise ClusterError(
                        f"the job server has been away for {_AWAY_S:g} s: {_first_line(error)}. {submission} may well run on; "
                        "the same command follows it again"
                    ) from error
                if said != str(error):
                    said = str(error)
                    write(f"\n{_first_line(error)}; following again\n")
            time.sleep(_POLL_S)

    def stop(self, submission: str) -> None:
        """Stop a job and wait until it has ended. Raises ClusterError when it does not."""
        end = time.monotonic() + _STOP_S
        with self._asking("stop the job"):
            self._client.stop_job(submission)
            while not (ended := self._client.get_job_info(submission).status.is_terminal()) and time.monotonic() < end:
                time.sleep(_POLL_S)
        if not ended:
            raise ClusterError(f"job {submission} has not ended within {_STOP_S:g} s; see `ray job status {submission}`")


class _Log:
    """A job's log, of which each line is written once however often it is asked for."""

    def __init__(self, client: Any, submission: str, write: Say) -> None:
        self._client, self._submission, self._write = client, submission, write
        self._written = 0

    async def tail(self) -> None:
        """Write what comes until the job ends or the connection does."""
        place = 0
        async for lines in self._client.tail_job_logs(self._submission):  # from the start, each time
            new = lines[max(self._written - place, 0) :]
            place += len(lines)
            self._written = max(self._written, place)
            if new:
                self._write(new)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def submit(
    job: config.Job,
    cluster: Cluster,
    say: Say,
    write: Say,
    *,
    restarts: int = 3,
    working_dir: Path | None = None,
    runtime_env: Mapping[str, Any] | None = None,
) -> int:
    """Send a job, or find the one that runs in its run root, and follow it. Returns the exit code for this process.

    Raises ConfigError without a run root, and when another job writes there.
    """
    require_shared(job)
    found = cluster.running(job.root)
    if found is not None and found.metadata[_DIGEST] != _digest(job):
        raise ConfigError(
            f"job {found.submission_id} with other settings writes to {job.root}; stop it (the same command with --stop), or "
            "give another run_root"
        )
    if found is None:
        submission = cluster.send(job, restarts, working_dir, runtime_env or {})
        say(f"submitted {submission}; Ctrl-C leaves it running")
    else:
        submission = found.submission_id
        say(f"following {submission}; Ctrl-C leaves it running")
    try:
        return cluster.follow(submission, write)
    except KeyboardInterrupt:
        again = shlex.join(["ctrlray", *sys.argv[1:]])
        say(f"\nleft {submission} running. Follow it again: {again}\nStop it: the same with --stop")
        return DETACHED


def stop(job: config.Job, cluster: Cluster, say: Say) -> int:
    """Stop the job that writes to a run root; its finished work stays. Raises ConfigError when there is none."""
    require_shared(job)
    found = cluster.running(job.root)
    if found is None:
        raise ConfigError(f"no job of this cluster writes to {job.root}; `ray job list` shows what runs")
    cluster.stop(found.submission_id)
    say(f"stopped {found.submission_id}; the same command without --stop goes on from what is finished")
    return 0


def require_shared(job: config.Job) -> None:
    """Raise ConfigError where a run would lie in the data directory of whichever node wrote."""
    if job.run_root is None:
        raise ConfigError(
            "run_root is not set: on a cluster it must be a place that all nodes reach, such as --set "
            f"run_root=s3://bucket/runs/{job.name}, or a path on a file system that they share"
        )


def exit_code(details: Any) -> int:
    """Of a job that ended: its driver's, 143 where it was stopped, 1 where it failed without a driver's code."""
    if details.status == "STOPPED":
        return STOPPED
    if details.status == "SUCCEEDED":
        return 0
    return int(details.driver_exit_code or 1)


def _pack(job: config.Job, folder: Path, working_dir: Path | None) -> None:
    if working_dir is None:
        folder.mkdir()
    else:
        shutil.copytree(working_dir, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / JOB_FILE).write_text(text, encoding="utf-8")


def _digest(job: config.Job) -> str:
    return digest(job.model_dump(mode="json"))
