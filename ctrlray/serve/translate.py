"""From what vLLM answers to a completion over token ids to what the API answers: chat replies and stream chunks.

vLLM is asked for a plain completion, because the prompt is rendered before it gets there; so the chat form is made here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctrlray.serve.api import ChatRequest, CompletionRequest, Sampled
from ctrlray.serve.refusal import Refusal

Json = dict[str, Any]
CHAT_CHUNK, PLAIN = "chat.completion.chunk", "text_completion"
_TOKEN_ID = "token_id:"
_COPIED = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "stop")


def order(request: Sampled, prompts: Sequence[Sequence[int]], max_tokens: int, request_id: str) -> Json:
    """The request that the engine gets: token ids, and of the caller's fields the sampling settings alone."""
    made: Json = {
        "model": request.model,
        "prompt": [list(ids) for ids in prompts],
        "max_tokens": max_tokens,
        "n": request.n,
        "request_id": request_id,
        "stream": bool(request.stream),
        "add_special_tokens": False,
    }
    made |= {name: value for name in _COPIED if (value := getattr(request, name)) is not None}
    if request.stream:
        made["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if request.response_format is not None:
        made["response_format"] = request.response_format.model_dump(by_alias=True, exclude_none=True)
    if isinstance(request, ChatRequest) and request.top is not None:
        made |= {"logprobs": request.top, "return_tokens_as_token_ids": True}
    if isinstance(request, CompletionRequest) and request.logprobs is not None:
        made["logprobs"] = request.logprobs
    return made


@dataclass(frozen=True)
class Head:
    """What stands at the top of a reply and of each of its chunks."""

    request_id: str
    model: str
    control: Mapping[str, int] | None
    """Levels in force; None for plain completions."""
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str, **rest: Any) -> Json:
        """The head of an object of this kind, and what follows."""
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model} | rest


def error_of(answer: Mapping[str, Any]) -> Refusal | None:
    """What an engine's answer that is an error means to the caller; None for an answer."""
    error = answer.get("error")
    if error is None:
        return None
    status = error.get("code") if isinstance(error.get("code"), int) else 500
    if 400 <= status < 500:
        return Refusal(status, str(error.get("message", "the engine refused the request")), error.get("param"))
    return Refusal(503, "the engine failed at this request; try again", code="engine_error", retry_after_s=1)


def chat_reply(head: Head, choices: Sequence[Json], usage: Json, request: ChatRequest, token: Callable[[int], str]) -> Json:
    """A whole answer. `choices` are vLLM's; `token` gives a token id's text."""
    made = [
        {
            "index": i,
            "message": {"role": "assistant", "content": c["text"]},
            "logprobs": _chat_logprobs(c, request, token),
            "finish_reason": c["finish_reason"],
        }
        | ({"achieved": c["achieved"]} if "achieved" in c else {})
        for i, c in enumerate(choices)
    ]
    return head.of("chat.completion", control=dict(head.control or {}), choices=made, usage=counted(usage))


def completion_reply(head: Head, choices: Sequence[Json], usage: Json) -> Json:
    """A whole plain completion."""
    return head.of(PLAIN, choices=plain_choices(choices), usage=counted(usage))


class Events:
    """Server-sent events of one stream, in ASCII: clients that read lines take characters beyond it for their ends.

    What stands at the top of every chunk is written once.
    """

    def __init__(self, head: Head, kind: str) -> None:
        self._top = json.dumps(head.of(kind)).removesuffix("}")

    def chunk(self, choices: Sequence[Json], **rest: Any) -> str:
        """One chunk; `rest` stands between head and choices."""
        return f"data: {self._top}, {json.dumps(rest | {'choices': choices})[1:]}\n\n"


def event(value: Json) -> str:
    """What is no chunk, an error, as a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def openers(head: Head, n: int, events: Events) -> list[str]:
    """The first chunk of each choice: the role, and the levels in force."""
    role, control = {"role": "assistant", "content": ""}, dict(head.control or {})
    return [events.chunk([_delta(i, role)], control=control) for i in range(n)]


def chat_choices(choices: Sequence[Json], request: ChatRequest, token: Callable[[int], str]) -> list[Json]:
    """What follows of an answer."""
    made = []
    for c in choices:
        piece = _delta(int(c["index"]), {"content": c["text"]} if c["text"] else {}, c.get("finish_reason"))
        if request.logprobs:
            piece["logprobs"] = _chat_logprobs(c, request, token)
        made.append(piece | ({"achieved": c["achieved"]} if "achieved" in c else {}))
    return made


def plain_choices(choices: Sequence[Json]) -> list[Json]:
    """What follows of a plain completion, or the whole of it."""
    return [{name: c.get(name) for name in ("index", "text", "logprobs", "finish_reason")} for c in choices]


def counted(usage: Mapping[str, Any]) -> Json:
    """Tokens used."""
    return {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


def _delta(index: int, delta: Json, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _chat_logprobs(choice: Json, request: ChatRequest, token: Callable[[int], str]) -> Json | None:
    found = choice.get("logprobs")
    if not request.logprobs or not found:
        return None
    content = []
    for name, logprob, others in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        likeliest = sorted((others or {}).items(), key=lambda pair: -pair[1])[: request.top]
        content.append(_token(name, logprob, token) | {"top_logprobs": [_token(n, p, token) for n, p in likeliest]})
    return {"content": content}


def _token(name: str, logprob: float, token: Callable[[int], str]) -> Json:
    text = token(int(name.removeprefix(_TOKEN_ID)))
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
