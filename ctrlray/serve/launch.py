"""Runs the application on this machine's Ray or on a cluster, and takes it down again."""

from __future__ import annotations

import importlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from ray import serve

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.pipeline import start_ray
from ctrlray.quiet import own_logging
from ctrlray.serve import transport
from ctrlray.serve.bypass import refuse_bypass, refuse_open, refuse_tokenless
from ctrlray.serve.catalog import resolve
from ctrlray.serve.dial import check_policy
from ctrlray.serve.edge import CALLBACK
from ctrlray.serve.policy import local_policy, read_policy
from ctrlray.serve.settings import ServeSettings

APP = "ctrlray"
_END_S = 30.0
"""What an end may take beside the answers that are waited for."""
_NICENESS = "RAY_worker_niceness"
"""Of the workers of a Ray that is started here. At 15, the default, what carries requests would wait for an engine's threads."""
_PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def run(settings: ServeSettings, host: str, port: int, cluster: config.Cluster) -> str | None:
    """Deploy on this machine's Ray, or on the cluster that `cluster` names; returns once all models are up.

    Without a policy file the key that was made is returned. Raises ConfigError.
    """
    refuse_open(host, settings.policy is not None)
    refuse_bypass()
    os.environ.setdefault(_NICENESS, "0")
    with ThreadPoolExecutor(1) as beside:
        app = beside.submit(_app)  # takes as long as Ray and Ray Serve take to start
        start_ray(cluster)
        refuse_tokenless()
        catalog = resolve(settings)
        key, policy = (None, None) if settings.policy else local_policy()
        if settings.policy:
            check_policy(read_policy(Path(settings.policy)), {e.name: e.dial for e in catalog.entries})
        serve.start(
            http_options={"host": host, "port": port},
            controller_options={"runtime_env": {"env_vars": {_PROXY_CALLBACK: CALLBACK} | transport.environment()}},
        )
        refuse_open(_held_to(port), settings.policy is not None)
        made = app.result().application(settings, catalog, policy)
    try:
        serve.run(made, name=APP)
    except BaseException:  # a cluster would go on trying
        stop(settings.drain_s)
        raise
    return key


def _app() -> ModuleType:
    """`ctrlray.serve.app`, which imports vLLM."""
    with own_logging():
        return importlib.import_module("ctrlray.serve.app")


def stop(drain_s: float) -> None:
    """Take the application down, whose answers have `drain_s` to end. Raises TimeoutError where it is up long after that."""
    latest_s = time.monotonic() + drain_s + _END_S
    while True:
        try:
            serve.delete(APP)
            return
        except TimeoutError:  # Ray waits for a minute at most, however long replicas may take; asking again changes nothing else
            if time.monotonic() >= latest_s:
                raise


def _held_to(port: int) -> str:
    """The address that Ray Serve listens at: an instance that ran before has chosen it. Raises ConfigError for another port."""
    from ray.serve.context import _get_global_client

    chosen = _get_global_client().http_config
    if chosen.port != port:
        raise ConfigError(f"port={port}: Ray Serve of this cluster listens at {chosen.port} already; give that port, or stop it")
    return str(chosen.host)
