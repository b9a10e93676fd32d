"""What users read when the hub says no: a real client against a local server that answers as the hub does."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import httpx
import pytest

from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.stages import prompts

ANSWERS = {
    "gated": (403, "GatedRepo", "Access to model is restricted"),
    "private": (401, "RepoNotFound", "Repository not found"),
    "revision": (404, "RevisionNotFound", "Invalid rev id"),
    "broken": (500, "", "internal error"),
}
ASK = """
import sys
from ctrlray import config, models
from ctrlray.errors import ConfigError
try:
    models.resolve(config.Model(name=sys.argv[1], revision=sys.argv[2] or None), sys.argv[3])
except ConfigError as error:
    print(error)
"""

ASK_ROWS = """
import sys
from ctrlray import config
from ctrlray.errors import ConfigError
from ctrlray.stages.prompts import read_source
try:
    list(read_source(config.HubPrompts(name=sys.argv[1], split="test")))
except ConfigError as error:
    print(error)
"""


FILE, OFF = "in a file", "in a file that is not to be used"
"""Where the token is, where it is not in HF_TOKEN."""


class Hub(BaseHTTPRequestHandler):
    came: ClassVar[list[str | None]] = []
    """Authorizations of the requests."""

    def do_GET(self):
        self.came.append(self.headers["Authorization"])
        status, code, message = ANSWERS.get(self.path.partition("/org/")[2].split("/")[0], (404, "", "not here"))
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    "name, revision, token, expected",
    [
        ("org/gated", "", "", ["model.name='org/gated' is gated", "(no token was sent: HF_TOKEN is not", "Accept its licence"]),
        ("org/gated", "", "hf_secret", ["(the token in HF_TOKEN was sent)", "Accept its licence"]),
        ("org/gated", "", FILE, ["(the token that `hf auth login` keeps here was sent)", "Accept its licence"]),
        ("org/gated", "", OFF, ["(no token was sent: HF_HUB_DISABLE_IMPLICIT_TOKEN is set)", "Accept its licence"]),
        ("org/private", "", "", ["no such model or it is private", "HF_TOKEN is not set", "Correct the name"]),
        ("org/revision", "v9", "", ["has no revision 'v9'"]),
        ("org/broken", "", "", ["the hub fails", "Check the network"]),
        ("not a name/at all!", "", "", ["neither a folder here nor a hub name"]),
    ],
)
def test_each_refusal_says_what_to_do(hub, tmp_path, monkeypatch, name, revision, token, expected):
    monkeypatch.setenv("HF_ENDPOINT", hub)
    said = asked(tmp_path, monkeypatch, token, ASK, name, revision, "model.name")
    assert all(e in said for e in expected), said


def asked(tmp_path, monkeypatch, token, program, *words):
    """What a program that asks the hub prints, in a process of its own: the client reads its address when it is imported."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token in (FILE, OFF):
        (tmp_path / "token").write_text("hf_secret")
    elif token:
        monkeypatch.setenv("HF_TOKEN", token)
    if token == OFF:
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    Hub.came.clear()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert "hf_secret" not in done.stdout + done.stderr and done.stdout, done.stderr
    assert ("Bearer hf_secret" in Hub.came) == (token in ("hf_secret", FILE))
    return done.stdout


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("org/gated", "hf_secret", ["data set 'org/gated', split 'test': ", "is a gated", "(the token in HF_TOKEN was sent)"]),
        ("org/gated", FILE, ["is a gated", "(the token that `hf auth login` keeps here was sent)"]),
        ("org/private", "", ["DatasetNotFoundError", "Check the name and the network", "(no token was sent: HF_TOKEN is"]),
    ],
)
def test_data_sets_that_the_hub_refuses(hub, tmp_path, monkeypatch, name, token, expected):
    monkeypatch.setenv("HF_ENDPOINT", hub)
    said = asked(tmp_path, monkeypatch, token, ASK_ROWS, name)
    assert all(e in said for e in expected), said


@pytest.mark.parametrize(
    "error",
    [OSError("reset"), ValueError("bad split"), httpx.ReadTimeout("slow"), RuntimeError("closed\n  client"), KeyError("x")],
    ids=lambda e: type(e).__name__,
)
def test_a_data_set_that_fails_while_it_streams(monkeypatch, error):
    import datasets

    def stream(*_, **__):
        yield {"prompt": "first"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", stream)
    read = prompts.read_source(config.HubPrompts(name="org/d"))
    assert next(read).messages == [{"role": "user", "content": "first"}]
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    with pytest.raises(ConfigError, match=re.escape(f"data set 'org/d', split 'train': {what}. Check the name and the network")):
        next(read)
    assert [r.name for r in prompts.read_source(config.HubPrompts(name="org/d", limit=1))] == ["org/d#1"]
