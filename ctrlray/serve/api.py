"""Requests of the API: which fields there are, and what they may hold. Whatever is not listed here is refused by name.

Beyond OpenAI's fields there are `control`, `control_strategy`, `candidates`, and of vLLM's sampling settings `top_k` and
`min_p`. Fields by which a caller could get around the dial (chat templates and their variables, token ids as prompts, logit
biases, allowed token ids, extra arguments) do not exist.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

MAX_SCHEMA_BYTES = 32_768
"""Of a JSON schema that answers must follow: it is compiled into a grammar."""
MAX_CHOICES = 128
_INT64 = 2**63
_MOST_FIELDS = 64
"""Of any object; each unknown one would make an error of its own, and long lists end at their first."""

Text = Annotated[str, Field(max_length=10_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Base of all requests: no unknown field, no number as text, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise ValueError(f"an object of {len(value)} fields; there are fewer than {_MOST_FIELDS}")
        return value


class TextPart(Strict):
    """A piece of a message's content; text is the only kind."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One turn. Special tokens inside of any of it are neutralised."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` counts as `system`."""
    content: Text | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    """Accepted for clients that send it; the model does not see it."""
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    """Accepted for clients that send it; the model does not see it."""

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(Strict):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    """A last chunk with the tokens used."""


class JsonSchema(Strict):
    """A schema that the answer follows."""

    name: Annotated[str, Field(max_length=256)] = "answer"
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema")]
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(value, allow_nan=False)) > MAX_SCHEMA_BYTES:
            raise ValueError(f"the schema is longer than {MAX_SCHEMA_BYTES} bytes; make it smaller")
        if (number := _beyond_int64(value)) is not None:
            raise ValueError(f"the schema holds {number}, which has more than 64 bits; make it smaller")
        return value


class ResponseFormat(Strict):
    """Free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type `json_schema`, and to that only")
        return self


class Sampled(Strict):
    """What chat and plain completions share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """A name that /v1/models lists."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Of one answer; as much as context and policy leave when unset."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64 - MAX_CHOICES)] | None = None
    """Not on CPU engines. Each further choice has the next one, and all of them are of 64 bits."""
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    """Accepted for clients that send it; not used."""

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048, fail_fast=True)]
    control: Annotated[dict[str, float | None], Field(max_length=16)] | None = None
    """The dial: `{"safety": 5, "helpfulness": 2}`. Rounded to the nearest level, halves up; missing ones take the default."""
    control_strategy: Literal["dial", "rerank"] | None = None
    """`dial`: by the model's own control codes; `rerank`: the best of several answers by the run's rewards; the model's own
    way when unset."""
    candidates: Annotated[int, Field(ge=2, le=MAX_CHOICES)] | None = None
    """Answers that `rerank` chooses from; 8, or as many as the policy allows, when unset."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one")
        if self.candidates is not None and self.candidates < self.n:
            raise ValueError(f"candidates={self.candidates} is less than n={self.n}")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of one answer, whichever name it came under."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Alternatives per token whose log-probs are wanted; None for no log-probs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """`POST /v1/completions`: plain text continued, without a dial."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=32)]
    """Text; token ids are not accepted."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ScoreRequest(Strict):
    """`POST /v1/control/scores`: how an answer does on the dial's attributes."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048, fail_fast=True)]
    answer: Text


def _beyond_int64(value: Any) -> int | None:
    """An integer somewhere in JSON that no 64 bits hold, which engines are not sent."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, int) and not -_INT64 <= item < 2 * _INT64:
            return item
    return None
