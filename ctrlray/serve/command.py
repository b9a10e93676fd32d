"""What `ctrlray serve` does: settings from a file and the command, then serving until it is stopped."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.quiet import quiet_ray
from ctrlray.serve.bypass import refuse_bypass, refuse_open
from ctrlray.serve.dial import check_policy
from ctrlray.serve.policy import PolicyFile
from ctrlray.serve.settings import ServeSettings

DRAIN_S = 5.0
"""Of a server in a terminal, whose Ctrl-C should not take minutes because somebody reads a stream."""
LOOK_S = 1.0
"""Between looks at the policy file."""


def settings_of(
    file: Path | None, models: Sequence[str], methods: Sequence[str], policy: str | None, overrides: Sequence[str]
) -> ServeSettings:
    """The file's settings, then what stands in the command. Raises ConfigError."""
    raw: dict[str, Any] = {"drain_s": DRAIN_S} | (config.read_job(file, what="settings file") if file else {})
    if models:
        raw["models"] = [{"model": m} | ({"methods": list(methods)} if methods else {}) for m in models]
    elif methods:
        raise ConfigError(f"--method {methods[0]} needs the name of a run beside it; a settings file has models.methods")
    if policy:
        raw["policy"] = str(Path(policy).resolve())
    for override in overrides:
        config.assign(raw, override)
    if not raw.get("models"):
        raise ConfigError("no model: name an exported folder or a run, or give --config with a file that does")
    return config.parse(ServeSettings, raw, where=str(file or "serve"))


@contextlib.contextmanager
def started(settings: ServeSettings) -> Iterator[tuple[str, str]]:
    """A server on this machine, for this process alone: its address and its key."""
    refuse_bypass()
    quiet_ray()
    click.echo("starting; an engine takes about a minute", err=True)
    from ctrlray.serve import launch

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    key = launch.run(settings, "127.0.0.1", port, config.Cluster())
    try:
        yield f"http://127.0.0.1:{port}", key or ""
    finally:
        launch.stop(settings.drain_s)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def serve_until_stopped(settings: ServeSettings, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ConfigError for what must not be served there."""
    refuse_open(host, settings.policy is not None)  # before anything slow
    refuse_bypass()
    quiet_ray()
    click.echo("starting; an engine takes about a minute")
    from ctrlray.serve import launch

    file = _policy_file(settings)
    key = launch.run(settings, host, port, config.Cluster())
    signal.signal(signal.SIGTERM, _end)  # Ray has set its own, which ends the process at once
    click.echo(f"ready    http://{host}:{port}/v1    (playground at http://{host}:{port}/, API at http://{host}:{port}/docs)")
    if key:
        click.echo(f"key      {key}")
    try:
        _wait(file)
    finally:
        click.echo("stopping")
        launch.stop(settings.drain_s)


def _policy_file(settings: ServeSettings) -> PolicyFile | None:
    """The policy file as the ingress reads it, which says in this terminal what the ingress says in its log."""
    if settings.policy is None:
        return None
    from ctrlray.serve.catalog import resolve

    dials = {e.name: e.dial for e in resolve(settings).entries}
    say = lambda text: click.echo(f"policy   {text}", err=True)  # noqa: E731
    return PolicyFile(Path(settings.policy), lambda policy: check_policy(policy, dials), say)


def _wait(file: PolicyFile | None) -> None:
    """Until a signal ends it."""
    while file is not None:
        time.sleep(LOOK_S)
        _ = file.policy
    signal.pause()
