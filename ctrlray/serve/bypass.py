"""Ways around the ingress, refused."""

from __future__ import annotations

import ipaddress
import os

from ctrlray.errors import ConfigError

_MODES = {
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "callers would reach vLLM's own routes",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "replicas would listen on ports of their own, on every interface",
    "RAY_SERVE_ENABLE_HA_PROXY": "replicas would listen on ports of their own, on every interface",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "replicas would listen on ports of their own, on every interface",
}


def refuse_bypass() -> None:
    """Raise ConfigError when Ray Serve is set to a mode in which requests do not pass the ingress."""
    for name, what in _MODES.items():
        if os.environ.get(name, "0") not in ("0", ""):
            raise ConfigError(f"{name}={os.environ[name]}: {what}, past the policy. Unset it, on every node")


def refuse_tokenless() -> None:
    """Raise ConfigError in a process of a Ray that asks nobody for a token: its replicas listen on every interface."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        raise ConfigError(
            "this Ray has no token (RAY_AUTH_MODE), and replicas listen for Ray's own calls on every interface: anybody would "
            "get past the policy. Make one with `ray get-auth-token --generate` and set RAY_AUTH_MODE=token on every node"
        )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host in (None, ""):
        return False
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_open(host: str | None, has_policy: bool) -> None:
    """Raise ConfigError when a server without a policy file would listen where other machines reach it."""
    if not has_policy and not is_loopback(host):
        raise ConfigError(
            f"host={host!r} is reachable from other machines, which needs a policy file: `ctrlray serve key` makes a key, "
            "--policy names the file"
        )
