"""A driver that comes back: the same command again when its process was killed, as by a machine that ran out of memory.

A driver that ends by itself, well or with an error, has said what there is to say and is not run again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import click

KILLED = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS}
"""Ends that a process does not choose; Ctrl-C and SIGTERM are somebody's wish."""
_PAUSE_S = 2.0


def keep(command: Sequence[str], most: int, pause_s: float = _PAUSE_S) -> int:
    """Run a command, again up to `most` times while it is killed; its exit code, 128 + the signal that killed it for good."""
    for tries in range(most + 1):
        code, asked = _once(command)
        if code not in KILLED or asked or tries == most:
            break
        click.echo(f"the driver was killed by signal {-code}; starting it again ({tries + 1} of {most})", err=True)
        time.sleep(pause_s)
    return code if code >= 0 else 128 - code


def _once(command: Sequence[str]) -> tuple[int, bool]:
    """Exit code of one run, and whether this process was told to end meanwhile, which is passed on."""
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        child = subprocess.Popen(command)
        if asked:  # before it was there
            child.send_signal(asked[0])
        return child.wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def again(arguments: Sequence[str]) -> list[str]:
    """`ctrlray` with these arguments, in this Python."""
    return [sys.executable, "-m", "ctrlray", *arguments]
