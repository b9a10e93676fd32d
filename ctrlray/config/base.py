"""What all settings are made of, and pools of actors."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Frozen(BaseModel):
    """Base of all settings: immutable, numbers finite, `true` no number and 1 not `true`, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _no_bool_for_a_number(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        # strict mode would refuse this too, and with it lists for tuples and the text that YAML 1.1 reads 1e-3 as
        made = validate(given)
        pairs = [(name, value, getattr(made, name)) for name, value in given.items()] if isinstance(given, dict) else []
        if found := [m for name, before, after in pairs for m in _mistaken(before, after, (name,))]:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return made


def _mistaken(given: Any, made: Any, at: tuple[int | str, ...]) -> Iterator[InitErrorDetails]:
    """Where a bool was taken for a number, or a number for a bool."""
    if isinstance(given, bool) and isinstance(made, int | float) and not isinstance(made, bool):
        why = PydanticCustomError("number_type", "Input should be a number, not true or false")
        yield InitErrorDetails(type=why, loc=at, input=given)
    elif isinstance(made, bool) and isinstance(given, int | float) and not isinstance(given, bool):
        why = PydanticCustomError("bool_type", "Input should be true or false, not a number")
        yield InitErrorDetails(type=why, loc=at, input=given)
    elif isinstance(given, list | tuple) and isinstance(made, tuple):
        for i, (before, after) in enumerate(zip(given, made, strict=False)):
            yield from _mistaken(before, after, (*at, i))
    elif isinstance(given, dict) and isinstance(made, dict):
        for key, value in given.items():
            yield from _mistaken(value, made.get(key), (*at, str(key)))


T = typing.TypeVar("T", bound=Frozen)


NodeGroup = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
"""Name of a group of a cluster's nodes: a custom resource that each of them has one of, as in the files of `cluster/`."""


class Pool(Frozen):
    """Size and resources of an actor pool."""

    min_size: Annotated[int, Field(ge=1)] = 1
    max_size: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs that one actor reserves in Ray; co-located pools take fractions."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    nodes: NodeGroup | None = None
    """Group of nodes that its actors run on; any node when unset."""
    max_restarts: Annotated[int, Field(ge=0, le=100)] = 10
    """How often in a row a dead actor is started anew, with nothing finished in between, before the stage fails."""

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is below min_size={self.min_size}; raise max_size")
        return self
