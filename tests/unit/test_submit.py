"""Submitting: what is sent, who is followed, exit codes, and what is refused, against a job server of one dictionary."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import ray.exceptions
import ray.job_submission
import requests
import yaml
from click.testing import CliRunner
from ray.job_submission import JobStatus

from ctrlray import config, quiet, submit
from ctrlray.cli import main
from ctrlray.errors import ConfigError


class Server:
    """Jobs by id; a job's status changes when its log has been read."""

    def __init__(self, address=None):
        self.jobs, self.sent, self.ends = {}, [], (JobStatus.SUCCEEDED, 0)
        self.log, self.breaks = ["one\n", "two\n"], 0

    def submit_job(self, **given):
        folder = Path(given["runtime_env"]["working_dir"])
        self.sent.append(given | {"files": {p.name: p.read_text() for p in folder.rglob("*") if p.is_file()}})
        self.add(given["submission_id"], given["metadata"])
        return given["submission_id"]

    def add(self, name, metadata, status=JobStatus.RUNNING):
        self.jobs[name] = SimpleNamespace(submission_id=name, metadata=metadata, status=status, driver_exit_code=None)

    def list_jobs(self):
        return list(self.jobs.values())

    def get_job_info(self, name):
        return self.jobs[name]

    def stop_job(self, name):
        self.jobs[name].status = JobStatus.STOPPED

    async def tail_job_logs(self, name):
        for i, line in enumerate(self.log):
            if isinstance(line, BaseException):
                raise line
            yield line
            if self.breaks and i == 0:
                self.breaks -= 1
                raise RuntimeError("connection closed")
        self.jobs[name].status, self.jobs[name].driver_exit_code = self.ends


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    """What `use_ray_token` sets is undone."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "disabled")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", lambda address: made)
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    return made


def run(*words, root="/shared/run"):
    return CliRunner().invoke(main, ["submit", "smoke", "--set", f"run_root={root}", *words])


def job(**changes):
    return config.load_job("smoke", ["run_root=/shared/run", *(f"{k}={v}" for k, v in changes.items())])


def test_the_resolved_job_travels_with_its_folder_and_nothing_else(server, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("x = 1")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "large").write_text("")
    (tmp_path / "env.yaml").write_text("{pip: [emoji], env_vars: {A: b}}")
    monkeypatch.setenv("HF_TOKEN", "hf_1")
    result = run(
        "--set", "seed=7", "--working-dir", str(tmp_path), "--env", "HF_TOKEN", "--runtime-env", str(tmp_path / "env.yaml")
    )
    assert result.exit_code == 0, result.output
    (sent,) = server.sent
    assert set(sent["files"]) == {"my_rewards.py", "env.yaml", submit.JOB_FILE}
    assert config.parse(config.Job, yaml.safe_load(sent["files"][submit.JOB_FILE]), where="t") == job(seed=7)
    assert sent["entrypoint"] == f"python -m ctrlray pipeline {submit.JOB_FILE} --restarts 3"
    assert sent["runtime_env"]["pip"] == ["emoji"] and sent["runtime_env"]["env_vars"] == {"A": "b", "HF_TOKEN": "hf_1"}
    assert result.stdout == "one\ntwo\n" and "Ctrl-C leaves it running" in result.stderr
    assert not Path(sent["runtime_env"]["working_dir"]).exists()


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ((JobStatus.SUCCEEDED, 0), 0),
        ((JobStatus.FAILED, 4), 4),
        ((JobStatus.FAILED, None), 1),
        ((JobStatus.STOPPED, None), 143),
    ],
)
def test_it_exits_with_the_job_s_code(server, ends, code):
    server.ends = ends
    assert run().exit_code == code


def test_a_job_that_runs_is_followed_not_sent_twice(server):
    server.add("other", {submit._ROOT: "/elsewhere", submit._DIGEST: "x"})
    server.add("ended", {submit._ROOT: "/shared/run", submit._DIGEST: "x"}, JobStatus.FAILED)
    server.add("mine", {submit._ROOT: "/shared/run", submit._DIGEST: submit._digest(job())})
    result = run()
    assert result.exit_code == 0 and "following mine" in result.stderr and not server.sent


def test_another_job_in_the_same_run_root_is_not_joined(server):
    server.add("mine", {submit._ROOT: "/shared/run", submit._DIGEST: submit._digest(job(seed=1))})
    result = run()
    assert result.exit_code == 2 and "job mine with other settings writes to /shared/run" in result.output and not server.sent


def test_a_broken_connection_repeats_no_line(server):
    server.breaks = 1
    result = run()
    assert result.exit_code == 0 and result.stdout == "one\n\nconnection closed; following again\ntwo\n"


def test_a_server_that_comes_back_is_followed_on_and_one_that_stays_away_ends_it(server, monkeypatch):
    answer, asked = server.get_job_info, []

    def away(name, times=3):
        asked.append(name)
        if len(asked) <= times:
            raise requests.exceptions.ConnectionError("no route\nto host")
        return answer(name)

    monkeypatch.setattr(server, "get_job_info", away)
    result = run()
    assert result.exit_code == 0 and result.stdout == "\nno route; following again\none\ntwo\n"
    monkeypatch.setattr(server, "get_job_info", lambda name: away(name, times=10**9))
    monkeypatch.setattr(submit, "_AWAY_S", 0.05)
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    server.jobs.clear()
    result = run()
    assert result.exit_code == 4 and "has been away for 0.05 s: no route. smoke-" in result.output
    assert "may well run on; the same command follows it again" in result.output


REFUSALS = [ray.exceptions.AuthenticationError("a token is needed"), aiohttp.ClientError("closed"), OSError("x")]


@pytest.mark.parametrize("error", REFUSALS)
def test_what_the_server_refuses_is_said_without_a_traceback(server, monkeypatch, error):
    def refuse(**given):
        raise error

    monkeypatch.setattr(server, "submit_job", refuse)
    result = run()
    assert result.exit_code == 4 and "error: the job server did not take the job: " in result.output


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(server, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ctrlray", "submit", "my job.yaml"])
    server.log = ["one\n", KeyboardInterrupt()]
    result = run()
    assert result.exit_code == 130
    assert "Follow it again: ctrlray submit 'my job.yaml'" in result.stderr and "--stop" in result.stderr
    assert next(iter(server.jobs.values())).status == JobStatus.RUNNING


def test_stopping_names_what_was_stopped_or_that_nothing_runs(server):
    result = run("--stop")
    assert result.exit_code == 2 and "no job of this cluster writes to /shared/run" in result.output
    server.add("mine", {submit._ROOT: "/shared/run", submit._DIGEST: "whatever"})
    result = run("--stop")
    assert result.exit_code == 0 and "stopped mine" in result.stderr and server.jobs["mine"].status == JobStatus.STOPPED


def test_a_job_that_will_not_stop_is_named(server, monkeypatch):
    monkeypatch.setattr(server, "stop_job", lambda name: None)
    monkeypatch.setattr(submit, "_STOP_S", 0.05)
    server.add("mine", {submit._ROOT: "/shared/run", submit._DIGEST: "whatever"})
    result = run("--stop")
    assert result.exit_code == 4 and "job mine has not ended within 0.05 s; see `ray job status mine`" in result.output


def test_a_run_root_is_asked_for_before_anything_is_sent():
    result = CliRunner().invoke(main, ["submit", "smoke"])
    assert result.exit_code == 2 and "run_root is not set: on a cluster" in result.output


def test_a_server_that_does_not_answer_is_named():
    result = run("--address", "http://127.0.0.1:9")
    assert result.exit_code == 4 and "no job server at http://127.0.0.1:9" in result.output


def test_a_variable_that_is_not_set_is_named(server, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert "--env NO_SUCH: no such variable in this shell" in run("--env", "NO_SUCH").output and not server.sent


@pytest.mark.parametrize(
    ("file", "mode", "expected"), [(True, None, "token"), (False, None, None), (True, "disabled", "disabled")]
)
def test_the_token_of_this_user_is_sent_unless_told_otherwise(tmp_path, monkeypatch, file, mode, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("t")
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    quiet.use_ray_token()
    assert os.environ.get("RAY_AUTH_MODE") == expected


def test_a_run_root_that_is_missing_is_no_config_error_of_the_job():
    with pytest.raises(ConfigError, match="s3://bucket/runs/smoke"):
        submit.require_shared(config.load_job("smoke"))
