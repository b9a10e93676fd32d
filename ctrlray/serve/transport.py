"""How the processes of a server call each other: over gRPC, each in its own event loop, or as Ray's actors do.

    CTRLRAY_SERVE_TRANSPORT=grpc-inline  the default: gRPC from proxies to the ingress and from there on, routed in the caller's
                                         event loop and worked on in the one that takes the call
    CTRLRAY_SERVE_TRANSPORT=grpc         the same, with a thread of its own for a replica's work
    CTRLRAY_SERVE_TRANSPORT=actor        Ray Serve's own way: calls of actors, with threads for routing and for work
    CTRLRAY_SERVE_TRANSPORT=actor-inline actors, without those threads

The variable is read where `ctrlray serve` starts the server; what `serve deploy` deploys reads it on the cluster, where
controller and proxies are Ray Serve's own. Ray Serve reads its own variables when its modules are imported, so they are in the
environment of the controller, from which proxies and replicas have theirs, and of all replicas of ours.

Work that nobody waits for ends on either: with `actor` Ray cancels the replica's task, over gRPC the call is cancelled, which
cancels the replica's handler of it; from there on either cancels what runs `DialServer.answer`, and that the engine's request.
"""

from __future__ import annotations

import os
from typing import Any

from ctrlray.errors import ConfigError

SWITCH = "CTRLRAY_SERVE_TRANSPORT"
DEFAULT = "grpc-inline"
_LONGEST_MESSAGE = 2**31 - 1
"""gRPC takes 4 MiB unless told; orders hold all prompts, whole answers all choices."""
_UNHURRIED = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1", "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000"}
"""By default the controller looks around, and every process hands metrics on, ten times a second: 3% of two cores."""
_OWN_ROUTER = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
_INLINE = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
_GRPC = _OWN_ROUTER | {
    "grpc_proxy": "",  # none, also where http_proxy names one: these are calls between the processes of one server
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(_LONGEST_MESSAGE),
}
_VARIABLES: dict[str, dict[str, str]] = {
    "actor": {},
    "actor-inline": _OWN_ROUTER | _INLINE,
    "grpc": _GRPC,
    "grpc-inline": _GRPC | _INLINE,
}


def chosen() -> str:
    """This process's transport. Raises ConfigError for one that there is not."""
    name = os.environ.get(SWITCH) or DEFAULT
    if name not in _VARIABLES:
        raise ConfigError(f"{SWITCH}={name}: there are {', '.join(_VARIABLES)}; set one of them, or unset it")
    return name


def environment() -> dict[str, str]:
    """What the server's other processes need in theirs."""
    name = chosen()
    return _UNHURRIED | {SWITCH: name} | _VARIABLES[name]


def handle_options() -> dict[str, Any]:
    """For the handle of a deployment whose arguments and answers are plain data."""
    if chosen().startswith("actor"):
        return {}
    return {"_by_reference": False, "request_serialization": "pickle", "response_serialization": "pickle"}
