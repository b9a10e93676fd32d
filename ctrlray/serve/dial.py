"""A served model's dial: which levels there are, which a caller may set, and which are in force for a request."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ctrlray.config import Attribute
from ctrlray.control import ControlSpace
from ctrlray.errors import ConfigError
from ctrlray.serve.policy import Bounds, Policy
from ctrlray.serve.refusal import Refusal


@dataclass(frozen=True)
class Range:
    """One attribute: its number of levels, the lowest and highest that may be set, and the one in force when none is named."""

    name: str
    levels: int
    low: int
    high: int
    default: int

    def within(self, bounds: Bounds) -> Range:
        """This range inside a caller's bounds. Raises ConfigError when nothing is left."""
        low = max(self.low, bounds.low or self.low)
        high = min(self.high, bounds.high or self.high)
        if low > high:
            raise ConfigError(
                f"attributes.{self.name}: {bounds.low}..{bounds.high} leaves no level of the model's {self.low}..{self.high}"
            )
        default = min(max(self.default, low), high) if bounds.default is None else bounds.default
        if not low <= default <= high:
            raise ConfigError(f"attributes.{self.name}.default={default} must lie in {low}..{high}")
        return replace(self, low=low, high=high, default=default)


class Setting(NamedTuple):
    """The levels in force for one request, in the dial's order."""

    levels: tuple[int, ...]
    clamped: tuple[str, ...]
    """Attributes whose requested level was outside of the caller's bounds and was moved to the nearest one inside."""


@dataclass(frozen=True)
class Dial:
    """All attributes, in the order of the control code."""

    ranges: tuple[Range, ...]
    encoding: str = "tokens"

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Dial:
        """The dial that a `ctrlray.json` describes."""
        fields = ("name", "levels", "low", "high", "default")
        return cls(tuple(Range(*(a[f] for f in fields)) for a in card["attributes"]), str(card["encoding"]))

    @property
    def space(self) -> ControlSpace:
        """The control space behind it."""
        return ControlSpace(tuple(Attribute(name=r.name, levels=r.levels) for r in self.ranges), self.encoding)

    def within(self, bounds: Mapping[str, Bounds]) -> Dial:
        """This dial inside a caller's bounds; attributes without any keep theirs."""
        return replace(self, ranges=tuple(r.within(bounds[r.name]) if r.name in bounds else r for r in self.ranges))

    def named(self, levels: tuple[int, ...]) -> dict[str, int]:
        """`(4, 2)` -> `{"helpfulness": 4, "safety": 2}`."""
        return dict(zip((r.name for r in self.ranges), levels, strict=True))

    def settle(self, asked: Mapping[str, float | None], bounds: Mapping[str, Bounds], clamp: bool) -> Setting:
        """The levels in force when a caller with these bounds asks for `asked`; a missing or null one takes the default.

        Levels are rounded to the nearest whole number, halves up. Raises a Refusal: 400 for an attribute or a level that the
        model does not have, 403 naming the bound for one that the caller may not set, unless `clamp`.
        """
        known = [r.name for r in self.ranges]
        if unknown := sorted(set(asked) - set(known)):
            raise Refusal(400, f"unknown attribute {unknown[0][:64]!r}; this model has {known}", f"control.{unknown[0][:64]}")
        levels, clamped = [], []
        for own, allowed in zip(self.ranges, self.within(bounds).ranges, strict=True):
            wanted = asked.get(own.name)
            level = allowed.default if wanted is None else _rounded(wanted, own)
            inside = min(max(level, allowed.low), allowed.high)
            if inside != level and not clamp:
                raise Refusal(
                    403,
                    f"control.{own.name}={wanted:g} is outside of the bounds of your key: {allowed.low}..{allowed.high}",
                    f"control.{own.name}",
                    "control_out_of_bounds",
                )
            if inside != level:
                clamped.append(own.name)
            levels.append(inside)
        return Setting(tuple(levels), tuple(clamped))


def _rounded(wanted: float, own: Range) -> int:
    level = math.floor(wanted + 0.5) if math.isfinite(wanted) else 0
    if not own.low <= level <= own.high:
        raise Refusal(400, f"control.{own.name}={wanted:g} must lie in {own.low}..{own.high}", f"control.{own.name}")
    return level


def check_policy(policy: Policy, dials: Mapping[str, Dial]) -> None:
    """Hold a policy against the models that are served. Raises ConfigError naming the key, the field and what there is."""
    for key in policy.keys:
        if unknown := sorted(set(key.models or ()) - set(dials)):
            raise ConfigError(f"key {key.name!r}: models has {unknown[0]!r}; served are {sorted(dials)}")
        mine = {name: dial for name, dial in dials.items() if key.models is None or name in key.models}
        attributes = {r.name for dial in mine.values() for r in dial.ranges}
        if unknown := sorted(set(key.attributes) - attributes):
            raise ConfigError(f"key {key.name!r}: attributes has {unknown[0]!r}; its models have {sorted(attributes)}")
        for name, dial in mine.items():
            try:
                dial.within(key.attributes)
            except ConfigError as error:
                raise ConfigError(f"key {key.name!r}, model {name!r}: {error}") from None


def from_header(text: str) -> dict[str, float | None]:
    """`safety=5, helpfulness=2.4` -> `{"safety": 5.0, "helpfulness": 2.4}`. Raises a Refusal for anything else."""
    found: dict[str, float | None] = {}
    for part in filter(str.strip, text.split(",")):
        pair = re.fullmatch(r"\s*([a-z][a-z0-9_]{0,31})\s*=\s*([+-]?\d{1,9}(?:\.\d{0,9})?)\s*", part)
        if not pair or pair[1] in found:
            raise Refusal(400, f"{part[:80]!r}: write it as `safety=5, helpfulness=2`, each attribute once", "X-Control")
        found[pair[1]] = float(pair[2])
    return found


def to_header(levels: Mapping[str, int]) -> str:
    """Inverse of `from_header`."""
    return ", ".join(f"{name}={level}" for name, level in levels.items())
