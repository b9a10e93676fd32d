"""What a stage did with its rows: rows in = rows out + dropped, by reason + quarantined, by error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ctrlray.errors import DataError


class Progress(Protocol):
    """Where a stage reports that rows are done."""

    def total(self, rows: int) -> None:
        """Say how many rows there will be."""

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Say that some more rows, with so many sampled tokens, are done."""

    def note(self, text: str) -> None:
        """Say what the stage is doing now."""

    def measure(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Say what an optimizer step of `name` measured."""


class Silent:
    """Progress that nobody watches."""

    def total(self, rows: int) -> None:
        """Ignore."""

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def measure(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Ignore."""


@dataclass(frozen=True)
class StageResult:
    """The accounts of one finished stage."""

    rows_in: int
    rows_out: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)
    tokens: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Small JSON values worth keeping beside the accounts."""

    def check(self, stage: str) -> StageResult:
        """Raise DataError when a row is unaccounted for."""
        lost = self.rows_in - self.rows_out - sum(self.dropped.values()) - sum(self.quarantined.values())
        if lost:
            raise DataError(
                f"{stage}: {self.rows_in} rows came in, {self.rows_out} went out, {dict(self.dropped)} were dropped and "
                f"{dict(self.quarantined)} quarantined: {lost} are unaccounted for. This is a bug; the stage's output is kept."
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def count(reasons: list[str]) -> dict[str, int]:
    """Reasons to counts, in alphabetical order."""
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
