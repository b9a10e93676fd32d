"""What `ctrlray chat` does around a conversation: finds or starts a server, reads lines, prints, keeps a history."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ctrlray import config
from ctrlray.errors import CtrlRayError
from ctrlray.serve.chat import Chat
from ctrlray.serve.client import Client

_HISTORY_LINES = 1000


def run(target: str, key: str, model: str | None, levels: Sequence[str], system: str | None, settings: dict[str, Any]) -> int:
    """Chat with the server at a URL, or with one started for a model folder or a run; the exit status. Raises a CtrlRayError."""
    with _server(target, key) as (url, given), contextlib.closing(Client(url, given)) as client:
        chat = Chat(client, _say, model, system, **settings)
        for pair in levels:
            name, _, level = pair.partition("=")
            chat.turn(name, level)
        if sys.stdin.isatty():
            with _history():
                return _converse(chat)
        return _answer_all(chat)


@contextlib.contextmanager
def _server(target: str, key: str) -> Iterator[tuple[str, str]]:
    """Address and key of a server."""
    if target.startswith(("http://", "https://")):
        yield target, key
        return
    from ctrlray.serve.command import settings_of, started

    with started(settings_of(None, [target], [], None, [])) as (url, own):
        yield url, own


def _say(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _converse(chat: Chat) -> int:
    click.echo(f"{chat.model} at {chat.dial}. /help lists commands.", err=True)
    while True:
        try:
            going = chat.take(input("> "))
        except EOFError:
            click.echo()
            return 0
        except KeyboardInterrupt:
            click.echo("\n(/quit or Ctrl-D leaves)", err=True)
            continue
        except CtrlRayError as error:
            click.echo(f"error: {error}", err=True)
            continue
        if not going:
            return 0


def _answer_all(chat: Chat) -> int:
    """Lines of a pipe; the first error ends it, since nobody is there to mend it."""
    for line in sys.stdin:
        if not chat.take(line):
            break
    return 0


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier conversations behind the arrow keys, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = config.data_home() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
