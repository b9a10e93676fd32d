"""Everything that can score an answer."""

from __future__ import annotations

import re
import string
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ctrlray.config.base import Frozen, Pool


class AnyReward(Frozen):
    """What every reward has."""

    judge: bool = False
    """Held out: it labels and trains nothing, and scores the evaluation beside the training rewards, under their outputs' names.

    The judges of a job give the same attributes as its training rewards, so its outputs are named like theirs."""


class EmbeddedReward(AnyReward):
    """Two linear heads (helpfulness, harmlessness) on the frozen SmolLM2; they ship with ctrlray."""

    type: Literal["embedded"] = "embedded"
    heads: str | None = None
    """A heads file from `ctrlray reward train`; the packaged heads when unset."""
    model: str = "embedded"
    """The backbone that the heads were made for."""

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives; None when only the heads file knows."""
        return ("helpfulness", "harmlessness") if self.heads is None else None


class TfidfReward(AnyReward):
    """Two linear heads (helpfulness, harmlessness) on TF-IDF n-grams of the answer, from human labels of the judges' half.

    They ship with ctrlray: no network, another architecture and other dialogues than `embedded`, so `judge: true` suits them.
    """

    type: Literal["tfidf"] = "tfidf"
    heads: str | None = None
    """A heads file from `ctrlray reward train` with `method: {type: tfidf}`; the packaged heads when unset."""

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives; None when only the heads file knows."""
        return ("helpfulness", "harmlessness") if self.heads is None else None


class HFReward(AnyReward):
    """A sequence-classification model: a local folder or hub name."""

    type: Literal["hf"] = "hf"
    model: str
    revision: str | None = None
    attributes: Annotated[tuple[str, ...], Field(min_length=1)]
    """One name per logit, in the model's order."""
    format: Literal["chat", "hh"] = "chat"
    """What it was trained to read: its tokenizer's chat template, or Anthropic HH's `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    trust_remote_code: bool = False

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return self.attributes


class FunctionReward(AnyReward):
    """Your own Python function `module:callable(prompts, responses)`."""

    type: Literal["function"] = "function"
    target: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """Called with a list of conversations and a list of answers; returns one list of floats, or a dict of them by attribute."""
    attributes: Annotated[tuple[str, ...], Field(min_length=1)]

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return self.attributes


class Endpoint(AnyReward):
    """How a reward over HTTP is called."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds the bearer token; it must be set on every node that runs reward actors."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Per request, from its start to the last byte of the answer."""
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    """Further tries after a timeout, a 429 or a 5xx, with exponential backoff and jitter."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests in flight per actor."""
    requests_per_second: Annotated[float, Field(gt=0)] | None = None
    """Limit per actor; none when unset."""

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        if re.match(r"\w+://[^/]*@", value):  # it would be kept in job.yaml and shown in the report
            raise ValueError("url holds credentials; put the token in an environment variable and name that in token_env")
        return value


class HTTPReward(Endpoint):
    """A server of your own that scores batches of answers.

    It gets `{"conversations": [[{"role", "content"}, ...], ...], "responses": [text, ...]}` and answers
    `{"scores": {attribute: [number, ...]}}`, one number per response and attribute.
    """

    type: Literal["http"] = "http"
    attributes: Annotated[tuple[str, ...], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Answers per request."""

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return self.attributes


class JudgeReward(Endpoint):
    """A language model that rates one answer per request, behind any OpenAI-compatible API (`url` ends in /v1).

    Its rating is the last number that follows the word `rating` or `score`, else the last number in the last line that holds one:
    7 in `Rating (1-10): 7` and in `7/10`, 7.5 in `7,5`. A reply without one is an error of its row, with the reply's end.
    """

    type: Literal["judge"] = "judge"
    model: str
    attribute: str
    """The one output it gives."""
    rubric: Annotated[str, Field(min_length=1)]
    """What a high and a low rating mean."""
    template: str | None = None
    """What the judge is sent, in your own words; unset, a prompt of ctrlray's own.

    It holds `{rubric}`, `{conversation}` and `{answer}`, and asks for the rating in the last line. The rubric is put in as it is,
    conversation and answer as JSON, so that nothing in them passes for an instruction's end. A brace of its own is doubled."""
    lowest: float = 1
    highest: float = 10
    """A rating outside of these is an error of its row."""
    max_tokens: Annotated[int, Field(ge=4)] = 256

    @field_validator("template")
    @classmethod
    def _filled(cls, value: str | None) -> str | None:
        if value is None:
            return None
        wanted = {"{rubric}", "{conversation}", "{answer}"}
        try:
            held = {_placeholder(*part[1:]) for part in string.Formatter().parse(value) if part[1] is not None}
        except ValueError as error:
            raise ValueError(f"{error}; a brace that holds no placeholder is written twice") from None
        for problem, names in (("unknown", held - wanted), ("missing", wanted - held)):
            if names:
                shown = ", ".join(sorted(names))
                raise ValueError(f"{problem}: {shown}; it takes each of {', '.join(sorted(wanted))}, and doubled braces")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> JudgeReward:
        if not self.lowest < self.highest:
            raise ValueError(f"lowest={self.lowest} must be below highest={self.highest}")
        return self

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Attributes it gives."""
        return (self.attribute,)


def _placeholder(name: str | None, form: str | None, conversion: str | None) -> str:
    """As it was written."""
    return f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"


Reward = Annotated[
    EmbeddedReward | TfidfReward | HFReward | FunctionReward | HTTPReward | JudgeReward, Field(discriminator="type")
]


class Score(Frozen):
    """Reward actors."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    pool: Pool = Pool(cpus=0.25)
