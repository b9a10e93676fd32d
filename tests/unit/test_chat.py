"""`ctrlray chat` against an ingress with fake engines: the dial, the conversation, Ctrl-C, errors, pipes and terminals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import httpx
import pytest
from click.testing import CliRunner

from ctrlray.cli import main
from ctrlray.errors import CtrlRayError
from ctrlray.serve.chat import Chat
from ctrlray.serve.client import Client
from ctrlray.serve.policy import Bounds
from tests.ingress import TOKENIZER, World
from tests.live import DialledEngine, listening


@pytest.fixture
def world():
    return World(engine=DialledEngine(" \x1b[2Jok"), attributes={"safety": Bounds(low=2, high=4)})


@pytest.fixture
def url(world):
    with listening(world) as found:
        yield found


@pytest.fixture
def chat(url):
    said = []
    client = Client(url, "ck-web")
    made = Chat(client, said.append, system="Be brief.")
    made.said = said
    yield made
    client.close()


def heard(chat):
    found = "".join(chat.said)
    chat.said.clear()
    return found


def test_the_dial_and_the_conversation(chat, world):
    assert chat.model == "tiny" and chat.dial == "safety 4, helpfulness 2"
    assert chat.take("Hi") and heard(chat) == "42 �[2Jok\n"  # an answer does not steer the terminal
    assert chat.take("/safety 3") and heard(chat) == "safety 3, helpfulness 2\n"
    chat.take("//safety is a word")
    assert heard(chat).startswith("32 ")
    prompt = TOKENIZER.decode(world.engine.orders[-1]["prompt"][0])
    assert "Be brief." in prompt and "Hi" in prompt and "42 " in prompt and "user\n/safety is a word<" in prompt
    chat.take("/levels")
    assert heard(chat).startswith("safety 3   (2 to 4 of 5 levels)\nhelpfulness 2   (1 to 3 of 3")
    chat.take("/reset")
    assert [m["role"] for m in chat.messages] == ["system"] and chat.levels["safety"] == 3
    chat.take("/help")
    assert "/safety 4" in heard(chat) and chat.take("") and not chat.take("/quit")


@pytest.mark.parametrize(
    "line, message",
    [
        ("/safety 5", "a level from 2 to 4"),
        ("/safety", "a level from 2 to 4"),
        ("/safty 3", "there are safety, helpfulness"),
    ],
)
def test_commands_that_are_none(chat, line, message):
    with pytest.raises(CtrlRayError, match=message):
        chat.take(line)
    assert chat.dial == "safety 4, helpfulness 2"


def test_errors_leave_the_conversation_as_it_was(chat, world):
    world.engine.breaks_after = 3
    with pytest.raises(CtrlRayError, match="broke off: the replica ended"):
        chat.take("Hi")
    world.engine.breaks_after = None
    world.engine.faults = [{"code": 503, "message": "gone"}]
    with pytest.raises(CtrlRayError, match="try again in 1 s"):
        chat.take("Hi")
    assert [m["role"] for m in chat.messages] == ["system"] and chat.take("Hi")


def test_servers_that_are_not_there_or_do_not_know_the_key(url):
    with pytest.raises(CtrlRayError, match="--key, or the variable CTRLRAY_API_KEY"):
        Chat(Client(url, "ck-wrong"), print)
    with pytest.raises(CtrlRayError, match="check that the server runs"):
        Chat(Client("http://127.0.0.1:9", "ck-web"), print)
    with pytest.raises(CtrlRayError, match="this key may use"):
        Chat(Client(url, "ck-web"), print, model="other")


def command(url, *words):
    return [sys.executable, "-m", "ctrlray", "chat", url, "--key", "ck-web", *words]


def test_from_a_pipe(url):
    done = subprocess.run(command(url, "--level", "safety=2"), input="Hi\n/helpfulness 3\nMore\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "22 �[2Jok\nsafety 2, helpfulness 3\n23 �[2Jok\n"
    failed = subprocess.run(command(url), input="/safety 9\nHi\n", capture_output=True, text=True)
    assert failed.returncode == 2 and "from 2 to 4" in failed.stderr and failed.stdout == ""


class FakeLaunch:
    """Stands for `ctrlray.serve.launch`: what it starts is a world."""

    def __init__(self, world):
        self.world, self.asked, self.serving = world, [], None

    def run(self, settings, host, port, cluster):
        self.asked.append(([m.model for m in settings.models], host, cluster.address))
        self.url = f"http://{host}:{port}"
        self.serving = listening(self.world, port)
        self.serving.__enter__()
        return "ck-web"

    def stop(self, drain_s):
        assert drain_s == 5
        self.serving.__exit__(None, None, None)


@pytest.mark.parametrize("line, status, said", [("Hi", 0, "22 �[2Jok\n"), ("/safety 9", 2, "from 2 to 4")])
def test_a_run_or_a_folder_has_a_server_of_its_own_until_the_end(world, monkeypatch, line, status, said):
    launch = FakeLaunch(world)
    monkeypatch.setattr("ctrlray.serve.launch", launch, raising=False)
    done = CliRunner().invoke(main, ["chat", "a/run", "--key", "ck-of-another", "--level", "safety=2"], input=f"{line}\n")
    assert done.exit_code == status and said in done.output and "starting; an engine takes" in done.stderr
    assert launch.asked == [(["a/run"], "127.0.0.1", None)]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{launch.url}/healthz")


def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_chat(url, world, tmp_path):
    world.engine.says, world.engine.pace_s = " word" * 200, 0.05
    ours, theirs = pty.openpty()
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path), "TERM": "dumb"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": environment}
    # a shell that starts tests in the background has SIGINT ignored, which children inherit
    reset = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command(url), start_new_session=True, preexec_fn=reset, **streams)
    os.close(theirs)
    seen = ""

    def until(text):
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < end, seen
            seen += os.read(ours, 1000).decode(errors="replace")

    try:
        until("> ")
        os.write(ours, b"Hi\n")
        until("42 word")
        process.send_signal(signal.SIGINT)
        until("(stopped)")
        os.write(ours, b"/safety 2\n")
        until("safety 2, helpfulness 2")
        os.write(ours, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    while world.in_flight:
        time.sleep(0.05)
    assert "/safety 2" in (tmp_path / "ctrlray" / "chat_history").read_text()
