"""A small client of the API, for the terminal: what the dial is, and streams of answers. Errors name the next step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from ctrlray.errors import ClusterError, ConfigError, CtrlRayError
from ctrlray.schema import Message

Json = dict[str, Any]
CONNECT_S, ANSWER_S = 10.0, 600.0


class Client:
    """One server. `transport` stands for the network in tests."""

    def __init__(self, url: str, key: str, transport: httpx.BaseTransport | None = None) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        try:
            self._http = httpx.Client(base_url=base, headers=headers, timeout=timeout, transport=transport)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ConfigError(f"URL {url!r} or its key cannot be used: {error}") from None

    def control(self) -> Json:
        """What `GET /v1/control` says. Raises a CtrlRayError."""
        try:
            answer = self._http.get("/v1/control")
        except httpx.HTTPError as error:
            raise _unreachable(self._http, error) from error
        if answer.status_code != 200:
            raise _refused(answer)
        found: Json = answer.json()
        return found

    def stream(self, model: str, messages: Sequence[Message], levels: Mapping[str, int], **settings: Any) -> Iterator[Json]:
        """Chunks of an answer; closing the iterator stops the answer. Raises a CtrlRayError, also on the way."""
        body = {"model": model, "messages": list(messages), "control": dict(levels), "stream": True} | settings
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _refused(answer)
                yield from _chunks(answer.iter_lines())
        except httpx.HTTPError as error:
            raise _unreachable(self._http, error) from error

    def close(self) -> None:
        """Close its connections."""
        self._http.close()


def _chunks(lines: Iterator[str]) -> Iterator[Json]:
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if data:
            chunk: Json = json.loads(data)
            if "error" in chunk:
                raise ClusterError(f"the answer broke off: {chunk['error']['message']}; ask again")
            yield chunk
    raise ClusterError("the answer broke off: the connection ended; ask again")


def _unreachable(http: httpx.Client, error: httpx.HTTPError) -> CtrlRayError:
    what = str(error) or type(error).__name__
    return ClusterError(f"no answer from {http.base_url}: {what}; check that the server runs, and its address")


def _refused(answer: httpx.Response) -> CtrlRayError:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ConfigError(f"{answer.url} answered {answer.status_code}, and not as a ctrlray server does; check the address")
    if answer.status_code == 401:
        return ConfigError(f"{message}: --key, or the variable CTRLRAY_API_KEY")
    wait = answer.headers.get("Retry-After")
    return ConfigError(message + (f"; try again in {wait} s" if wait else ""))
