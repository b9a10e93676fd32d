"""The HTTP side: routes, errors in OpenAI's form, and the description of it all. No other route exists."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Header, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ctrlray import __version__
from ctrlray.serve import playground
from ctrlray.serve.api import ChatRequest, CompletionRequest, ScoreRequest, Strict
from ctrlray.serve.aside import aside
from ctrlray.serve.dial import from_header
from ctrlray.serve.entrance import App
from ctrlray.serve.front import Front
from ctrlray.serve.guard import Guard, Left
from ctrlray.serve.page import api_page
from ctrlray.serve.policy import Key
from ctrlray.serve.refusal import OVER_LIMIT, Refusal
from ctrlray.serve.responses import EventStream, Reply, unless_left
from ctrlray.serve.work import LEFT, Work

PUBLIC = playground.PATHS | {"/", "/docs", "/openapi.json", "/healthz"}
_CLIENT_ERRORS = {400: "Bad request", 401: "No valid key", 403: "Out of the key's bounds", 404: "No such model or route"}
_LIMITS = {
    408: "Body too slow",
    413: "Body too large",
    429: "Too many requests; see Retry-After",
    503: "No engine; see Retry-After",
}
_EXAMPLE = {"error": {"message": "…", "type": "invalid_request_error", "param": "control.safety", "code": None}}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"example": _EXAMPLE}}}
    for status, text in (_CLIENT_ERRORS | _LIMITS | {500: "An error of the server"}).items()
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with `stream: true` its events", "content": {"text/event-stream": {}}}
}
CHAT, CONTROL = "/v1/chat/completions", "X-Control"
_KIND = re.compile(r"\[|constrained|^str$")
"""Of the places that pydantic names: the kinds of a union, which are no fields."""
_TITLE = "ctrlray"
_ABOUT = (
    "OpenAI-compatible chat completions with a dial: `control` sets each attribute's level per request, in the body or as the "
    "header `X-Control: safety=5, helpfulness=2`. `GET /v1/control` tells which levels your key may set."
)


class _Described(FastAPI):
    """Describes itself with the errors that there are, not with FastAPI's 422, and with the key that routes need."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        found = super().openapi()
        for path, methods in found["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if path not in PUBLIC:
                    operation["security"] = [{"key": []}]
        parts = found.setdefault("components", {})
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        return found


def create_app(front: Front, max_body_bytes: int, body_timeout_s: float, max_held_bytes: int) -> App:
    """The whole application, its guard around it."""
    app = _Described(title=_TITLE, version=__version__, description=_ABOUT, docs_url=None, redoc_url=None)
    _add_answers(app, front)
    _add_facts(app, front)
    _add_pages(app)
    _add_errors(app, front)

    def public(path: str) -> bool:
        return path in PUBLIC or (path == "/metrics" and front.open_metrics)

    return Guard(app, front.caller, public, front.desk.refused, max_body_bytes, body_timeout_s, max_held_bytes)


def _key(request: Request) -> Key:
    key = request.state.key
    assert isinstance(key, Key)
    return key


def _dial(request: Request, header: str | None) -> dict[str, float | None]:
    """The dial as the header sets it, of which there is one."""
    if (times := len(request.headers.getlist(CONTROL))) > 1:
        raise Refusal(400, f"{CONTROL} is there {times} times; write one, such as `safety=5, helpfulness=2`", CONTROL)
    return from_header(header or "")


def _note_admitted(request: Request) -> None:
    """Its outcome is counted as such, whatever it is: no longer as refused before an engine saw it."""
    request.state.admitted = True


async def _answered(request: Request, work: Work) -> Response:
    """The whole answer, or its stream once the first token is there."""
    _note_admitted(request)
    try:
        if work.request.stream:
            await unless_left(request.receive, work.begin())
            return EventStream(work)
        reply = await unless_left(request.receive, work.whole())
        await work.close()
        return Reply(reply, headers=work.headers())
    except (Left, asyncio.CancelledError):
        await work.close(LEFT)
        raise
    except Refusal as refusal:
        await work.close(refusal.status)
        raise
    except Exception:
        await work.close(500)
        raise


def _add_answers(app: FastAPI, front: Front) -> None:
    @app.post(CHAT, responses=ERRORS | ANSWERS, tags=["answers"])
    async def chat_completions(
        body: ChatRequest, request: Request, x_control: Annotated[str | None, Header(max_length=1024)] = None
    ) -> Response:
        """Answer a conversation at the levels of the dial; with `stream: true` as server-sent events."""
        work = await front.chat(body, _key(request), _dial(request, x_control))
        return await _answered(request, work)

    @app.post("/v1/completions", responses=ERRORS | ANSWERS, tags=["answers"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue plain text. There is no dial here, so a key needs the operator's leave for it."""
        if CONTROL in request.headers:
            raise Refusal(400, f"plain completions take no control; leave {CONTROL} out, or use {CHAT}", CONTROL)
        return await _answered(request, await front.complete(body, _key(request)))

    @app.post("/v1/control/scores", responses=ERRORS, tags=["control"])
    async def control_scores(body: ScoreRequest, request: Request) -> Response:
        """The levels that an answer achieves by the run's rewards, in continuous level units."""
        admitted = functools.partial(_note_admitted, request)
        return Reply(await unless_left(request.receive, front.scores(body, _key(request), admitted)))


def _add_facts(app: FastAPI, front: Front) -> None:
    @app.get("/v1/models", responses=ERRORS, tags=["models"])
    async def models(request: Request) -> Response:
        """Models that the key may use."""
        return Reply({"object": "list", "data": [_card(m.name) for m in front.models(_key(request))]})

    @app.get("/v1/models/{model}", responses=ERRORS, tags=["models"])
    async def model(model: Annotated[str, Path(max_length=256)], request: Request) -> Response:
        """One model."""
        return Reply(_card(front.model(model, _key(request)).name))

    @app.get("/v1/control", responses=ERRORS, tags=["control"])
    async def control(request: Request) -> Response:
        """Attributes, levels and defaults inside of the key's bounds, and the key's limits."""
        return Reply(front.describe(_key(request)))

    refused: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 429, 503)}

    @app.get("/metrics", response_class=PlainTextResponse, responses=refused, tags=["operation"])
    async def metrics(request: Request) -> Response:
        """Requests, tokens and latency by model and level, for Prometheus; for keys that the policy marks for it."""
        content = await front.metrics(getattr(request.state, "key", None))
        return Response(content, media_type="text/plain; version=0.0.4")

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Response:
        """Whether the ingress is up."""
        return Reply({"status": "ok"})


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ctrlray"}


def _add_pages(app: FastAPI) -> None:
    @functools.cache
    def described() -> str:
        """Rendered once: anybody may ask for it, and it takes some milliseconds."""
        return api_page(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(described())

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return _part(playground.PAGE)

    @app.get("/playground/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return _part(name)


def _part(name: str) -> Response:
    if name not in playground.FILES:
        raise HTTPException(404)
    content, kind = playground.FILES[name]
    return Response(content, media_type=kind, headers=dict(playground.HEADERS))


def _add_errors(app: FastAPI, front: Front) -> None:
    async def refuse(request: Request, refusal: Refusal) -> Response:
        key = getattr(request.state, "key", None)
        if not getattr(request.state, "admitted", False):
            aside(front.desk.refused(key.name if key else "", refusal.status))
        request.state.over_limit = refusal.code == OVER_LIMIT  # for the guard
        return Reply(refusal.body(), refusal.status, refusal.headers())

    @app.exception_handler(Refusal)
    async def _refused(request: Request, error: Refusal) -> Response:
        return await refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return await refuse(request, explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        what = {404: f"no route {request.url.path[:80]!r}; GET /docs lists those there are"}
        return await refuse(request, Refusal(error.status_code, what.get(error.status_code, str(error.detail))))

    @app.exception_handler(Left)
    async def _left(request: Request, error: Left) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> Response:
        return await refuse(request, Refusal(500, "an error of the server; its log has the details"))


def explain(problems: Sequence[Mapping[str, Any]]) -> Refusal:
    """A request's first problem as a sentence that names the field; for an unknown field, those there are.

    Where a value may be of several kinds there is a problem for each: the one furthest inside, or that is no matter of kind, is
    about the kind that was meant.
    """
    first = [p for p in problems if p["loc"][:2] == problems[0]["loc"][:2]]
    problem = max(first, key=lambda p: (len(p["loc"]), not str(p["type"]).endswith("_type")))
    places = [str(p) for p in problem["loc"][1:] if not _KIND.search(str(p))]
    field = ".".join(places)[:200]
    if problem["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {problem.get('ctx', {}).get('error', 'cannot be read')}")
    if problem["type"] == "extra_forbidden":
        known = f"; there are {_fields()}" if len(places) == 1 else ""
        return Refusal(400, f"{field}: this field is not accepted here{known}", field, "unknown_field")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return Refusal(400, f"{field}: {message}" if field else message, field or None)


def _fields() -> str:
    kinds: tuple[type[Strict], ...] = (ChatRequest, CompletionRequest)
    return "; ".join(f"of {k.__name__}: {', '.join(sorted(k.model_fields))}" for k in kinds)
