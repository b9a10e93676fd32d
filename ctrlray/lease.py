"""One run at a time in a run root: a lease that its holder renews, and that a dead holder loses.

A holder on this machine is alive while its process is; one elsewhere while its last renewal is fresh. So a run that was
killed is taken over at once here, and a minute later from another machine.

Of two that come at once one gets it: on a local file system looking and writing are one step under a lock; on others who
wrote reads again a moment later, and the last writer has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ctrlray.errors import ConfigError, CtrlRayError
from ctrlray.tables import Storage
from ctrlray.telemetry import current, warn

FILE = "running.json"
RENEW_S, STALE_S = 15.0, 60.0
SETTLE_S = 1.0
"""How long after writing a lease another's may still replace it, where no lock keeps two from writing."""
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
        with _alone(self._storage) as alone:
            require_free(self._storage)
            self._write()
        if not alone:
            time.sleep(SETTLE_S)
            holder = _noted(self._storage)
            if holder is not None and holder["id"] != self._id:
                raise _held(self._storage, holder)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give it back. Where storage is away it stays, and is no error: it would hide what the run itself ended with."""
        self._over.set()
        self._thread.join()
        try:
            holder = _noted(self._storage)
            if holder is not None and holder["id"] == self._id:
                self._storage.remove(FILE)
        except (CtrlRayError, OSError) as problem:
            warn(current(), f"{FILE} of {self._storage.uri} is left behind: {problem}")

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
        process = {"pid": os.getpid(), "started": _started(os.getpid())}
        mine = {"id": self._id, "machine": machine(), "host": socket.gethostname(), **process, "renewed": time.time()}
        self._storage.write_json(mine, FILE)


@contextlib.contextmanager
def _alone(storage: Storage) -> Iterator[bool]:
    """Keep others on this file system from taking a lease of `storage` meanwhile; False where there is no such lock."""
    folder = None
    if storage.is_local:
        with contextlib.suppress(OSError):  # writing the lease says what is wrong with the folder
            os.makedirs(storage.path(), exist_ok=True)
            folder = os.open(storage.path(), os.O_RDONLY)
    try:
        yield folder is not None and _locked(folder)
    finally:
        if folder is not None:
            os.close(folder)  # and with it the lock


def _locked(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError:  # network file systems that cannot lock a folder
        return False
    return True


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
    """Whether the process that took a lease still runs: that one, not another that was given its number since."""
    if holder["machine"] != machine():
        return bool(time.time() - holder["renewed"] < STALE_S)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and there
        pass
    now, then = _started(int(holder["pid"])), holder.get("started")
    return now is None or then is None or now == then


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot, which no setting of the clock moves; None where it is not told."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


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
