"""From a checked request to an engine's answer: whose it is, which levels are in force, what it may take, what comes back.

    key ─► model ─► levels in force ─► token ids ─► limits ─► engine ─► reply
                                                                └──► rewards, where the best of several is wanted

Nothing here knows HTTP, Ray or vLLM.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from ctrlray.serve.api import ChatRequest, CompletionRequest, Sampled, ScoreRequest
from ctrlray.serve.aside import aside
from ctrlray.serve.desk import Counts, Outcome
from ctrlray.serve.dial import Setting
from ctrlray.serve.limits import Asked, Wait
from ctrlray.serve.policy import Key, Policy
from ctrlray.serve.prompts import turns_of
from ctrlray.serve.refusal import OVER_LIMIT, Refusal
from ctrlray.serve.served import Judge, Served, achieved
from ctrlray.serve.translate import Head, Json, order
from ctrlray.serve.work import LEFT, Work

DEFAULT_CANDIDATES = 8
DEFAULT_COMPLETION_TOKENS = 16
"""Of /v1/completions when max_tokens is unset, as in OpenAI's API."""


class Front:
    """All models behind one policy. `problem` says why the policy file is not in force, and is empty when it is."""

    def __init__(
        self,
        models: Sequence[Served],
        policy: Callable[[], Policy],
        desk: Counts,
        judge: Judge | None,
        problem: Callable[[], str] = lambda: "",
    ) -> None:
        self._models = {m.name: m for m in models}
        self._policy = policy
        self.desk = desk
        self.judge = judge
        self._registry = CollectorRegistry()
        broken = Gauge(
            "ctrlray_policy_file_broken",
            "1 while the policy file cannot be used and the policy of before stays in force",
            registry=self._registry,
        )
        broken.set_function(lambda: float(bool(problem())))

    def caller(self, authorization: str | None) -> Key:
        """Whose `Authorization: Bearer` header this is. Raises a Refusal."""
        scheme, _, presented = (authorization or "").partition(" ")
        found = self._policy().find(presented.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise Refusal(401, "no valid key; send `Authorization: Bearer <key>`", code="invalid_api_key")
        return found

    @property
    def open_metrics(self) -> bool:
        """Whether /metrics needs no key."""
        return self._policy().metrics == "open"

    async def metrics(self, key: Key | None) -> bytes:
        """Prometheus text. Raises a Refusal for a key that may not read it."""
        if not (self.open_metrics or (key is not None and key.metrics)):
            raise Refusal(403, "your key may not read /metrics, which is about all keys; the policy needs `metrics: true` for it")
        return await self.desk.metrics() + generate_latest(self._registry)

    def models(self, key: Key) -> list[Served]:
        """What a key may use."""
        return [m for m in self._models.values() if key.models is None or m.name in key.models]

    def model(self, name: str, key: Key) -> Served:
        """A model by its name. Raises a Refusal."""
        for found in self.models(key):
            if found.name == name:
                return found
        allowed = [m.name for m in self.models(key)]
        raise Refusal(404, f"no model {name[:80]!r} for this key; there are {allowed}", "model", "model_not_found")

    async def chat(self, request: ChatRequest, key: Key, header: Mapping[str, float | None]) -> Work:
        """Admit a conversation; the answer is then asked of what is returned. Levels in the body win over the header's."""
        served = self.model(request.model, key)
        reranked = self._reranked(request, served)
        setting = served.dial.settle({**header, **(request.control or {})}, key.attributes, key.out_of_bounds == "clamp")
        choices = self._candidates(request, key) if reranked else request.n
        _check(request, key, served, choices)
        turns = turns_of(request.messages)
        ids = await served.prompts.chat(turns, setting.levels)
        limit = _longest(request.limit, key, served.prompts.max_context - len(ids), _share(key, len(ids), choices))
        work = self._work("chatcmpl", request, key, served, [ids], setting, limit, choices)
        if reranked:
            work.rerank(self._required_judge("control_strategy"), turns, choices)
        await self._admit(work.asked)
        return work

    async def complete(self, request: CompletionRequest, key: Key) -> Work:
        """Admit a plain completion."""
        if not key.completions:
            raise Refusal(403, "your key may not use /v1/completions, which knows no dial; use /v1/chat/completions")
        served = self.model(request.model, key)
        _check(request, key, served, request.n * len(request.prompts))
        ids = await served.prompts.plain(request.prompts)
        room = served.prompts.max_context - max(map(len, ids))
        limit = _longest(request.max_tokens, key, room, DEFAULT_COMPLETION_TOKENS)
        work = self._work("cmpl", request, key, served, ids, None, limit, request.n)
        await self._admit(work.asked)
        return work

    async def scores(self, request: ScoreRequest, key: Key, admitted: Callable[[], None] = lambda: None) -> Json:
        """Achieved levels of an answer. It counts as a request of as many tokens as it holds. `admitted` is called when it is."""
        served, judge = self.model(request.model, key), self._required_judge(None)
        turns = turns_of(request.messages)
        ids = await served.prompts.plain(["\n".join([*(m["content"] for m in turns), request.answer])])
        asked = Asked(uuid.uuid4().hex, key, served.name, len(ids[0]))
        await self._admit(asked)
        admitted()
        begun_s, status = time.monotonic(), LEFT
        try:
            (units,) = await judge.units(turns, [request.answer])
            status = 200
        except Refusal as refusal:
            status = refusal.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            spent_s = time.monotonic() - begun_s
            await self.desk.settle(Outcome(asked.ticket, key.name, served.name, status, {}, asked.tokens, 0, spent_s, None))
        return {"object": "control.scores", "model": served.name, "achieved": achieved(served.dial, units)}

    def describe(self, key: Key) -> Json:
        """The dial as a caller may set it, and the caller's limits."""
        limits = ("max_tokens", "requests_per_minute", "tokens_per_minute", "concurrent", "choices", "completions")
        models = [
            {
                "model": m.name,
                "method": m.method,
                "strategies": (["dial"] if m.prompts.coded else []) + (["rerank"] if self.judge else []),
                "protected": m.dial.encoding == "tokens",
                "attributes": [vars(r) for r in m.dial.within(key.attributes).ranges],
            }
            for m in self.models(key)
        ]
        own = {"name": key.name, "out_of_bounds": key.out_of_bounds} | {name: getattr(key, name) for name in limits}
        return {"object": "control", "key": own, "scores": self.judge is not None, "data": models}

    def _reranked(self, request: ChatRequest, served: Served) -> bool:
        strategy = request.control_strategy or ("dial" if served.prompts.coded else "rerank")
        if strategy == "dial" and not served.prompts.coded:
            raise Refusal(400, f"{served.name!r} knows no control codes; use control_strategy: rerank", "control_strategy")
        if strategy == "rerank":
            self._required_judge("control_strategy")
            if request.logprobs:
                raise Refusal(400, "logprobs are not there for reranked answers; leave them out", "logprobs")
        elif request.candidates is not None:
            raise Refusal(400, "candidates belong to control_strategy: rerank", "candidates")
        return strategy == "rerank"

    def _candidates(self, request: ChatRequest, key: Key) -> int:
        return request.candidates or max(min(DEFAULT_CANDIDATES, key.choices), request.n)

    def _required_judge(self, field: str | None) -> Judge:
        if self.judge is None:
            raise Refusal(400, "this server has no rewards; start it with a run and `rewards: true`", field)
        return self.judge

    def _work(
        self,
        prefix: str,
        request: Sampled,
        key: Key,
        served: Served,
        prompts: Sequence[list[int]],
        setting: Setting | None,
        limit: int,
        choices: int,
    ) -> Work:
        ticket = uuid.uuid4().hex
        control = None if setting is None else served.dial.named(setting.levels)
        tokens = sum(map(len, prompts))
        asked = Asked(ticket, key, served.name, tokens + len(prompts) * choices * limit)
        clamped = () if setting is None else setting.clamped
        head = Head(f"{prefix}-{ticket}", served.name, control)
        return Work(asked, head, request, order(request, prompts, limit, ticket), served, self.desk, tokens, clamped)

    async def _admit(self, asked: Asked) -> None:
        admission = asyncio.ensure_future(self.desk.admit(asked))
        try:
            wait = await asyncio.shield(admission)
        except asyncio.CancelledError:  # the caller left, and the desk may have given a place, or be about to
            aside(self._give_back(admission, asked))
            raise
        if wait is not None and not wait.retry_after_s:
            raise Refusal(403, wait.message)
        if wait is not None:
            code = OVER_LIMIT if wait.of_key else "queue_full"
            raise Refusal(429, wait.message, code=code, retry_after_s=wait.retry_after_s)

    async def _give_back(self, admission: Awaitable[Wait | None], asked: Asked) -> None:
        if await admission is None:  # one that ends with an error holds nothing
            await self.desk.settle(Outcome(asked.ticket, asked.key.name, asked.model, LEFT, {}, 0, 0, 0.0, None))


def _check(request: Sampled, key: Key, served: Served, choices: int) -> None:
    """`choices`: answers in all, candidates and those of every prompt among them."""
    prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
    if choices > key.choices:
        field = "n" if choices == request.n * prompts else "candidates"
        what = f"{field}={choices}" if prompts == 1 else f"{field}={request.n} of {prompts} prompts, {choices} answers,"
        raise Refusal(403, f"{what} is above the {key.choices} choices that your key may have", field)
    if request.temperature == 0 and choices > prompts:
        asked = choices == request.n * prompts
        step = "ask for one, or raise it" if asked else "reranking chooses from different ones, so raise it"
        raise Refusal(400, f"temperature=0 makes all answers the same; {step}", "temperature")
    if request.seed is not None and not served.seeds:
        raise Refusal(400, "seed is not supported by this model's CPU engine; leave it out", "seed")


def _share(key: Key, prompt_tokens: int, choices: int) -> int:
    """Most tokens of an answer of which a minute's worth of the key's holds `choices`, and the prompt; at least one."""
    return max(((key.tokens_per_minute or sys.maxsize) - prompt_tokens) // choices, 1)


def _longest(wanted: int | None, key: Key, room: int, default: int) -> int:
    """Most tokens of an answer: what the request, else the default, the policy and the context allow. Raises a Refusal."""
    if wanted is None:
        return min(key.max_tokens or room, room, default)
    if key.max_tokens and wanted > key.max_tokens:
        if key.out_of_bounds == "refuse":
            raise Refusal(403, f"max_tokens={wanted} is above the bound of your key, {key.max_tokens}", "max_tokens")
        wanted = key.max_tokens
    if wanted > room:
        message = f"max_tokens={wanted} does not fit: prompt and context leave {room} tokens"
        raise Refusal(400, message, "max_tokens", "context_length_exceeded")
    return wanted
