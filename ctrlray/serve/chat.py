"""`ctrlray chat`: a conversation in the terminal, with the dial as commands. Also reads from a pipe, one message a line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from ctrlray.errors import ConfigError, CtrlRayError
from ctrlray.schema import Message
from ctrlray.serve.client import Client

HELP = """/NAME LEVEL   set one attribute, such as /{example}
/levels       the dial as it is, and what you may set
/reset        forget the conversation; the dial stays
/help         this
/quit         leave (also Ctrl-D)
Anything else is a message; begin it with // if it starts with a slash. Ctrl-C stops an answer."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters by which an answer could steer the terminal."""


class Chat:
    """One conversation with one model; `say` writes text as it comes."""

    def __init__(
        self,
        client: Client,
        say: Callable[[str], None],
        model: str | None = None,
        system: str | None = None,
        **settings: Any,
    ) -> None:
        described = {m["model"]: m for m in client.control()["data"]}
        if not described:
            raise ConfigError("this key may use no model; ask the operator")
        name = model or next(iter(described))
        if name not in described:
            raise ConfigError(f"--model {name!r}: this key may use {sorted(described)}")
        self.model = name
        self.attributes: dict[str, dict[str, Any]] = {a["name"]: a for a in described[name]["attributes"]}
        self.levels: dict[str, int] = {n: a["default"] for n, a in self.attributes.items()}
        self._system = [Message(role="system", content=system)] if system else []
        self.messages = list(self._system)
        self._client = client
        self._say = say
        self._settings = settings

    def take(self, line: str) -> bool:
        """Do what a line says; False when it says to leave. Raises a CtrlRayError that leaves the conversation as it was."""
        text = line.strip()
        if not text:
            return True
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text[1:].split())
        self._ask(text.removeprefix("/"))
        return True

    def turn(self, name: str, level: str) -> None:
        """Set one attribute. Raises ConfigError outside of the caller's bounds."""
        if name not in self.attributes:
            known = ", ".join(self.attributes)
            raise ConfigError(f"/{name} is no command and no attribute; there are {known}. /help lists commands")
        own = self.attributes[name]
        if not re.fullmatch(r"\d{1,2}", level) or not own["low"] <= int(level) <= own["high"]:
            raise ConfigError(f"/{name} {level or '?'}: give a level from {own['low']} to {own['high']}")
        self.levels[name] = int(level)

    @property
    def dial(self) -> str:
        """`safety 5, helpfulness 2`."""
        return ", ".join(f"{name} {level}" for name, level in self.levels.items())

    def _command(self, words: list[str]) -> bool:
        name = words[0] if words else "help"
        if name in ("quit", "exit"):
            return False
        if name == "help":
            first, own = next(iter(self.attributes.items()))
            self._say(HELP.format(example=f"{first} {own['high']}") + "\n")
        elif name == "reset":
            self.messages = list(self._system)
            self._say(f"new conversation at {self.dial}\n")
        elif name == "levels":
            for attribute, own in self.attributes.items():
                self._say(f"{attribute} {self.levels[attribute]}   ({own['low']} to {own['high']} of {own['levels']} levels)\n")
        else:
            self.turn(name, " ".join(words[1:]))
            self._say(f"{self.dial}\n")
        return True

    def _ask(self, text: str) -> None:
        """Stream an answer. Ctrl-C ends it; what came of it stays in the conversation."""
        asked = [*self.messages, Message(role="user", content=text)]
        answer = ""
        chunks = self._client.stream(self.model, asked, self.levels, **self._settings)
        try:
            with contextlib.closing(chunks):  # type: ignore[type-var]  # a generator
                for piece in _texts(chunks):
                    answer += piece
                    self._say(_CONTROL.sub("�", piece))
            self._say("\n")
        except KeyboardInterrupt:
            self._say("\n(stopped)\n")
        except CtrlRayError:
            if answer:
                self._say("\n")
            raise
        if answer:
            self.messages = [*asked, Message(role="assistant", content=answer)]


def _texts(chunks: Iterator[dict[str, Any]]) -> Iterator[str]:
    for chunk in chunks:
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                yield text
