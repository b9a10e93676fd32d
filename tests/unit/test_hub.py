"""What users read when the hub says no: a real client against a local server that answers as the hub does."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

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


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        status, code, message = ANSWERS[self.path.split("/org/")[1].split("/")[0]]
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
        ("org/gated", "", "", ["model.name='org/gated' is gated", "HF_TOKEN is not set", "Accept its licence"]),
        ("org/gated", "", "hf_secret", ["the token in HF_TOKEN", "Accept its licence"]),
        ("org/private", "", "", ["no such model or it is private", "HF_TOKEN is not set", "Correct the name"]),
        ("org/revision", "v9", "", ["has no revision 'v9'"]),
        ("org/broken", "", "", ["the hub fails", "Check the network"]),
        ("not a name/at all!", "", "", ["neither a folder here nor a hub name"]),
    ],
)
def test_each_refusal_says_what_to_do(hub, tmp_path, monkeypatch, name, revision, token, expected):
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    # the client reads its address when it is imported, so each case has a process of its own
    done = subprocess.run([sys.executable, "-c", ASK, name, revision, "model.name"], capture_output=True, text=True, timeout=120)
    assert all(e in done.stdout for e in expected), (done.stdout, done.stderr)
    assert "hf_secret" not in done.stdout + done.stderr
