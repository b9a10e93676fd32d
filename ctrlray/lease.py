"""One run at a time in a run root: a lease that its holder renews, and that a dead holder loses.

A holder on this machine is alive while its process is; one elsewhere while its last renewal is fresh. So a run that was
killed is taken over at once here, and a minute later from another machine.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from ctrlray.errors import ConfigError, CtrlRayError
from ctrlray.tables import Storage

FILE = "running.json"
RENEW_S, STALE_S = 15.0, 60.0
_KEYS = {"id", "machine", "host", "pid", "renewed"}


class Lease:
    """Use as a context manager around whatever writes to a run root. Raises ConfigError when another run holds it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._id = uuid.uuid4().hex
        self._over = threading.Event()
        self._lost: dict[str, Any] | None = None

    def __enter__(self) -> Lease:
        """Take the lease."""
        require_free(self._storage)
        self._write()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give it back."""
        self._over.set()
        self._thread.join()
        holder = _noted(self._storage)
        if holder is not None and holder["id"] == self._id:
            self._storage.remove(FILE)

    def check(self) -> None:
        """Raise ConfigError when another run took the lease over, which two that start in the same instant can do."""
        if self._lost is not None:
            raise _held(self._storage, self._lost)

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            try:
                holder = _noted(self._storage)
                if holder is None or holder["id"] == self._id:
                    self._write()
                else:
                    self._lost = holder
                    return
            except (CtrlRayError, OSError):  # a full disk or a lost connection: the run itself will meet it and say so
                continue

    def _write(self) -> None:
        mine = {"id": self._id, "machine": machine(), "host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
        self._storage.write_json(mine, FILE)


def holder_of(storage: Storage) -> dict[str, Any] | None:
    """The live run in a run root: `host`, `pid`, `renewed`; None when there is none."""
    found = _noted(storage)
    return found if found and alive(found) else None


def require_free(storage: Storage) -> None:
    """Raise ConfigError when a live run writes to that root."""
    if (holder := holder_of(storage)) is not None:
        raise _held(storage, holder)


def _noted(storage: Storage) -> dict[str, Any] | None:
    if not storage.exists(FILE):
        return None
    try:
        found = storage.read_json(FILE)
    except FileNotFoundError:  # given back since
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(found) >= _KEYS:
        raise ConfigError(f"{storage.path(FILE)} is not a lease of a run; delete it when no run writes to {storage.uri}")
    return found


def alive(holder: dict[str, Any]) -> bool:
    """Whether the process that took a lease still runs."""
    if holder["machine"] != machine():
        return bool(time.time() - holder["renewed"] < STALE_S)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and there
        pass
    return True


def machine() -> str:
    """Where process ids mean the same: a host, as booted, and a namespace in it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    known = [boot.read_text().strip() if boot.is_file() else "", os.readlink(namespace) if namespace.is_symlink() else ""]
    return "/".join([socket.gethostname(), *known])


def _held(storage: Storage, holder: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"another run is writing to {storage.uri} (process {holder['pid']} on {holder['host']}); wait for it, stop it, or give "
        "another run_root"
    )
