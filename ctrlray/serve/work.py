"""One admitted request: asks the engine, makes the reply or the stream of it, and settles what it took, however it ends."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from ctrlray.control import nearest_first
from ctrlray.schema import Message
from ctrlray.serve.api import ChatRequest, Sampled
from ctrlray.serve.desk import Counts, Outcome
from ctrlray.serve.dial import to_header
from ctrlray.serve.limits import Asked
from ctrlray.serve.refusal import Refusal
from ctrlray.serve.served import Judge, Served, achieved
from ctrlray.serve.translate import (
    CHAT_CHUNK,
    PLAIN,
    Events,
    Head,
    Json,
    chat_choices,
    chat_reply,
    completion_reply,
    counted,
    error_of,
    event,
    openers,
    plain_choices,
)

_LOG = logging.getLogger(__name__)
LEFT = 499
"""Status in metrics of a request whose caller went away."""
_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class _Contest:
    """Several answers, of which the nearest to the setting are kept."""

    judge: Judge
    turns: Sequence[Message]


@dataclass
class Work:
    """Use `whole` or, for a stream, `begin` and then `events`; `close` at the end in any case."""

    asked: Asked
    head: Head
    request: Sampled
    order: Json
    served: Served
    desk: Counts
    prompt_tokens: int
    clamped: tuple[str, ...]
    status: int = 200
    _contest: _Contest | None = None
    _batches: AsyncGenerator[list[str], None] | None = None
    _first: list[Json] = field(default_factory=list)
    _spent: dict[int, int] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)
    """Choices of a stream that have come to their end."""
    _asked_whole: bool = False
    _closed: bool = False
    _begun_s: float = field(default_factory=time.monotonic)
    _first_token_s: float | None = None

    def rerank(self, judge: Judge, turns: Sequence[Message], candidates: int) -> None:
        """Sample so many answers and keep those nearest to the setting."""
        self._contest = _Contest(judge, turns)
        self.order |= {"n": candidates, "stream": False}
        self.order.pop("stream_options", None)

    def headers(self) -> dict[str, str]:
        """The levels in force, and which of them were moved into the caller's bounds."""
        found = {} if self.head.control is None else {"X-Control": to_header(self.head.control)}
        return found | ({"X-Control-Clamped": ", ".join(self.clamped)} if self.clamped else {})

    async def whole(self) -> Json:
        """The whole answer. Raises a Refusal."""
        choices, usage = await self._choices()
        if isinstance(self.request, ChatRequest):
            return chat_reply(self.head, choices, usage, self.request, self.served.prompts.token)
        return completion_reply(self.head, choices, usage)

    async def begin(self) -> None:
        """Wait for the first token, so that what goes wrong before it still has an HTTP status. Raises a Refusal."""
        if self._contest is not None:
            choices, usage = await self._choices()
            self._first = [{"choices": choices, "usage": usage}]
            return
        self._batches = self.served.engine.answer(self.order)
        async for batch in self._batches:
            self._first, problem = self._read(batch)
            if problem is not None:
                raise problem
            return
        raise Refusal(503, "the engine gave no answer; try again", code="engine_error", retry_after_s=1)

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events; an error on the way is the last one before the end."""
        stream = Events(self.head, CHAT_CHUNK if isinstance(self.request, ChatRequest) else PLAIN)
        last = ""
        try:
            yield "".join(self._openers(stream)) + self._written(self._first, stream)
            if self._batches is not None:
                async for batch in self._batches:
                    docs, problem = self._read(batch)
                    if text := self._written(docs, stream):
                        yield text
                    if problem is not None:
                        raise problem
                self._check_ended()
            if self.request.wants_usage:
                last = stream.chunk([], usage=counted(self._usage()))
        except Refusal as refusal:
            self.status = refusal.status
            last = event(refusal.body())
        except Exception:
            _LOG.exception("a stream ended with an error")
            self.status = 500
            last = event(Refusal(500, "the answer broke off by an error of the server").body())
        yield last + _DONE

    async def close(self, status: int | None = None) -> None:
        """Give back what was not taken, and count; once, whatever follows."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._batches is not None:
                await self._batches.aclose()  # an engine stops where nobody listens
        except RuntimeError:  # it is being read still, by what is being cancelled, which closes it
            _LOG.debug("an answer was closed while it was read")
        finally:
            await self._settle(status or self.status)

    async def _settle(self, status: int) -> None:
        outcome = Outcome(
            ticket=self.asked.ticket,
            key=self.asked.key.name,
            model=self.asked.model,
            status=status,
            levels=self.head.control or {},
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(self._spent.values()),
            seconds=time.monotonic() - self._begun_s,
            first_token_s=self._first_token_s if self.request.stream else None,
            uncounted_tokens=self._uncounted(status),
        )
        await self.desk.settle(outcome)

    def _uncounted(self, status: int) -> int:
        """All that was set aside for an answer which was left, or whose engine ended, before anybody could count its tokens."""
        if self._asked_whole and not self._spent and status in (LEFT, 503):
            return self.asked.tokens - self.prompt_tokens
        return 0

    async def _choices(self) -> tuple[list[Json], Json]:
        """All choices of an answer that is not streamed, best first where rewards choose, and its usage."""
        found: list[Json] = []
        self._asked_whole = True
        async with aclosing(self.served.engine.answer(self.order)) as batches:
            async for batch in batches:
                docs, problem = self._read(batch)
                if problem is not None:
                    raise problem
                found += docs
        if len(found) != 1:
            raise Refusal(503, "the engine gave no answer; try again", code="engine_error", retry_after_s=1)
        choices = list(found[0]["choices"])
        if self._contest is not None:
            choices = await self._nearest(choices, self._contest)
        return choices, self._usage()

    async def _nearest(self, choices: Sequence[Json], contest: _Contest) -> list[Json]:
        units = await contest.judge.units(contest.turns, [c["text"].strip() for c in choices])
        levels = tuple((self.head.control or {}).values())
        kept = nearest_first(units, levels)[: self.request.n]
        return [choices[i] | {"index": place, "achieved": achieved(self.served.dial, units[i])} for place, i in enumerate(kept)]

    def _read(self, batch: Sequence[str]) -> tuple[list[Json], Refusal | None]:
        """What a batch holds before the engine's error, and the error."""
        docs: list[Json] = []
        for text in batch:
            doc = json.loads(text)
            if (problem := error_of(doc)) is not None:
                return docs, problem
            docs.append(doc)
            if self._first_token_s is None:
                self._first_token_s = time.monotonic() - self._begun_s
            if usage := doc.get("usage"):
                self._count(doc, int(usage.get("completion_tokens") or 0))
            self._ended |= {int(c["index"]) for c in doc["choices"] if c.get("finish_reason")}
        return docs, None

    def _check_ended(self) -> None:
        """Raises a Refusal for a stream that stopped before all of its choices did: what came of it is not the answer."""
        if len(self._ended) < self.order["n"] * len(self.order["prompt"]):
            raise Refusal(503, "the answer broke off: its engine stopped; try again", code="engine_error", retry_after_s=1)

    def _count(self, doc: Json, tokens: int) -> None:
        """Keep vLLM's counts: of one choice in its chunks, of all of them in a whole answer and in a stream's last chunk."""
        if self.order["stream"] and doc["choices"]:
            self._spent[int(doc["choices"][0]["index"])] = tokens
        else:
            self._spent = {0: tokens}

    def _usage(self) -> Json:
        spent = sum(self._spent.values())
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": spent, "total_tokens": self.prompt_tokens + spent}

    def _openers(self, stream: Events) -> list[str]:
        return openers(self.head, self.request.n, stream) if isinstance(self.request, ChatRequest) else []

    def _written(self, docs: Sequence[Json], stream: Events) -> str:
        return "".join(stream.chunk(self._shown(doc["choices"])) for doc in docs if doc["choices"])

    def _shown(self, choices: Sequence[Json]) -> list[Json]:
        if isinstance(self.request, ChatRequest):
            return chat_choices(choices, self.request, self.served.prompts.token)
        return plain_choices(choices)
