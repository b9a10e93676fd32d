"""Runs the application on this machine's Ray or on a cluster, and takes it down again."""

from __future__ import annotations

from pathlib import Path

from ray import serve

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.pipeline import start_ray
from ctrlray.serve.app import application
from ctrlray.serve.bypass import refuse_bypass, refuse_open
from ctrlray.serve.catalog import resolve
from ctrlray.serve.dial import check_policy
from ctrlray.serve.edge import CALLBACK
from ctrlray.serve.policy import local_policy, read_policy
from ctrlray.serve.settings import ServeSettings

APP = "ctrlray"
_PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def run(settings: ServeSettings, host: str, port: int, cluster: config.Cluster) -> str | None:
    """Deploy on this machine's Ray, or on the cluster that `cluster` names; returns once all models are up.

    Without a policy file the key that was made is returned. Raises ConfigError.
    """
    refuse_open(host, settings.policy is not None)
    refuse_bypass()
    start_ray(cluster)
    catalog = resolve(settings)
    key, policy = (None, None) if settings.policy else local_policy()
    if settings.policy:
        check_policy(read_policy(Path(settings.policy)), {e.name: e.dial for e in catalog.entries})
    serve.start(
        http_options={"host": host, "port": port},
        controller_options={"runtime_env": {"env_vars": {_PROXY_CALLBACK: CALLBACK}}},
    )
    refuse_open(_held_to(port), settings.policy is not None)
    try:
        serve.run(application(settings, catalog, policy), name=APP)
    except BaseException:  # a cluster would go on trying
        stop()
        raise
    return key


def stop() -> None:
    """Take the application down."""
    serve.delete(APP)


def _held_to(port: int) -> str:
    """The address that Ray Serve listens at: an instance that ran before has chosen it. Raises ConfigError for another port."""
    from ray.serve.context import _get_global_client

    chosen = _get_global_client().http_config
    if chosen.port != port:
        raise ConfigError(f"port={port}: Ray Serve of this cluster listens at {chosen.port} already; give that port, or stop it")
    return str(chosen.host)
