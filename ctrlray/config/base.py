"""What all settings are made of, and pools of actors."""

from __future__ import annotations

import typing
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Base of all settings: immutable, numbers finite, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
    """How often a dead actor is started anew before the stage fails."""

    @model_validator(mode="after")
    def _ordered(self) -> Pool:
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is below min_size={self.min_size}; raise max_size")
        return self
