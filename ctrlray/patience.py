"""Waiting with an end: work that finishes nothing for a set time fails, saying what it waits for.

What is waited on runs in a thread of its own, so the waiting thread stays open to Ctrl-C as well.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ctrlray.errors import ClusterError

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a stage may finish nothing, and how it says what it waits for."""

    stage: str
    timeout_s: float
    waits_for: Callable[[], str]

    def over(self) -> ClusterError:
        """The error of a stage that stalled."""
        return ClusterError(
            f"{self.stage}: nothing finished for {self.timeout_s:g} s; it waits for {self.waits_for()}. What is finished is "
            "kept: mend that, or raise cluster.stall_timeout_s where it is only slow, and run the same command again."
        )

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items as they come. Raises ClusterError when none comes in time; errors of the items pass."""
        box: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=1)

        def pump() -> None:
            try:
                for item in items:
                    box.put(("item", item))
                box.put(("end", None))
            except BaseException as error:  # whatever it is, it belongs to the waiting thread
                box.put(("error", error))

        threading.Thread(target=pump, daemon=True).start()
        while True:
            try:
                kind, value = box.get(timeout=self.timeout_s)
            except queue.Empty:
                raise self.over() from None
            if kind == "end":
                return
            if isinstance(value, BaseException) and kind == "error":
                raise value
            yield value  # type: ignore[misc]  # an item, as `kind` says


class Background:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def over(self, wait_s: float) -> bool:
        """Wait so long at most; whether the call has ended. Raises what the call raised."""
        self._thread.join(wait_s)
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True
