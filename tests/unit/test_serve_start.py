"""Before anything is served: settings, models to serve, modes and addresses that are refused, and the headers' time limit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from ctrlray.cli import main
from ctrlray.config import parse
from ctrlray.errors import ConfigError
from ctrlray.serve import catalog, command, edge
from ctrlray.serve.bypass import is_loopback, refuse_bypass, refuse_open, refuse_tokenless
from ctrlray.serve.command import settings_of
from ctrlray.serve.policy import hashed
from ctrlray.serve.settings import ServeSettings
from tests.fakes import tiny_tokenizer
from tests.ingress import unhurried

CARD = {
    "method": "exmate",
    "encoding": "tokens",
    "attributes": [{"name": "safety", "levels": 5, "low": 1, "high": 5, "default": 5}],
}


POLICY = f"keys: [{{{{name: web, hash: '{hashed('ck-web')}'{{}}}}}}]"


def exported(folder, **changes):
    """A folder as `ctrlray export` writes it, without weights."""
    folder.mkdir(parents=True)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 512}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / catalog.CARD).write_text(json.dumps(CARD | changes))
    return folder


def resolve(*sources, **settings):
    return catalog.resolve(ServeSettings.model_validate({"models": [*sources], **settings}))


@pytest.mark.parametrize("has_token", [True, False])
def test_a_ray_that_asks_nobody_for_a_token_is_refused(monkeypatch, has_token):
    monkeypatch.setattr("ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: has_token)
    with contextlib.nullcontext() if has_token else pytest.raises(ConfigError, match="get-auth-token --generate"):
        refuse_tokenless()


@pytest.mark.parametrize(
    "variable",
    [
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS",
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    ],
)
def test_modes_that_bypass_the_ingress_are_refused_at_start(monkeypatch, variable):
    monkeypatch.setenv(variable, "0")
    refuse_bypass()
    monkeypatch.setenv(variable, "1")
    done = CliRunner().invoke(main, ["serve", "nowhere"])
    assert done.exit_code == 2 and variable in done.output and "past the policy" in done.output


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", None])
def test_other_machines_only_with_a_policy(host):
    refuse_open(host, has_policy=True)
    with pytest.raises(ConfigError, match="needs a policy file"):
        refuse_open(host, has_policy=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert is_loopback(host)
    refuse_open(host, has_policy=False)


def test_serve_on_a_public_interface_without_a_policy_ends_at_once():
    done = CliRunner().invoke(main, ["serve", "nowhere", "--host", "0.0.0.0"])
    assert done.exit_code == 2 and "reachable from other machines" in done.output and "starting" not in done.output


def test_a_key_and_its_hash_are_printed():
    lines = CliRunner().invoke(main, ["serve", "key"]).output.split()
    assert lines[0] == "key" and lines[2] == "hash" and hashed(lines[1]) == lines[3]


def test_settings_of_file_and_command(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("models: [{model: a, name: b}]\nreplicas: {max: 2}\n")
    assert settings_of(file, [], [], None, ["replicas.max=3"]).replicas.max == 3
    found = settings_of(file, ["quickstart"], ["exmate", "start"], "policy.yaml", ["rewards=true"])
    assert found.models[0].model == "quickstart" and found.models[0].methods == ("exmate", "start")
    assert found.models[0].name is None and found.policy.startswith("/") and found.rewards


def test_a_server_in_a_terminal_ends_soon_and_one_of_a_cluster_ends_what_it_says(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("models: [{model: a}]\ndrain_s: 60\n")
    assert settings_of(None, ["a"], [], None, []).drain_s == 5
    assert settings_of(None, ["a"], [], None, ["drain_s=7"]).drain_s == 7 and settings_of(file, [], [], None, []).drain_s == 60
    assert ServeSettings.model_validate({"models": [{"model": "a"}]}).drain_s == 300


class FakeLaunch:
    """Stands for `ctrlray.serve.launch`: nothing is deployed."""

    def __init__(self, key):
        self.key, self.asked, self.stopped = key, [], []

    def run(self, settings, host, port, cluster):
        self.asked.append((settings.models[0].model, host, port))
        return self.key

    def stop(self, drain_s):
        self.stopped.append(drain_s)


class Ended(BaseException):
    """What a signal raises."""


def serve(monkeypatch, settings, launch, looks=(), host="127.0.0.1"):
    """Serve until what happens between looks at the policy file has happened, then the signal comes."""
    happens = iter(looks)

    def wait(*_):
        step = next(happens, None)
        if step is None:
            raise Ended
        step()

    monkeypatch.setattr("ctrlray.serve.launch", launch, raising=False)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command.signal, "pause", wait)
    monkeypatch.setattr(command, "time", SimpleNamespace(sleep=wait))  # this module's alone: threads of others sleep too
    with pytest.raises(Ended):
        command.serve_until_stopped(settings, host, 8123)


def test_address_and_key_are_printed_and_the_end_takes_the_server_down(monkeypatch, capsys):
    launch = FakeLaunch("ck-new")
    serve(monkeypatch, settings_of(None, ["a"], [], None, ["drain_s=90"]), launch)
    said = capsys.readouterr().out
    assert launch.asked == [("a", "127.0.0.1", 8123)] and launch.stopped == [90]
    assert "http://127.0.0.1:8123/v1" in said and "key      ck-new\n" in said and said.endswith("stopping\n")


def test_with_a_policy_no_key_is_printed_and_the_terminal_tells_of_a_broken_file(monkeypatch, capsys, tmp_path):
    path = tmp_path / "policy.yaml"

    def put(text):
        path.write_text(text)
        os.utime(path, (1.0 + len(text), 1.0 + len(text)))  # as if long ago

    good, unfit = POLICY.format(""), POLICY.format(", attributes: {kindness: {}}")
    put(good)
    steps = [lambda: put("keys: ["), lambda: None, lambda: put(good), lambda: put(unfit), lambda: None]
    launch, settings = FakeLaunch(None), settings_of(None, [str(exported(tmp_path / "mine"))], [], str(path), [])
    serve(monkeypatch, settings, launch, steps, host="0.0.0.0")
    said = capsys.readouterr()
    assert launch.stopped == [5] and "key  " not in said.out
    _, broken, again, misfit = said.err.split("policy   the policy file is ")
    assert "policy of before stays" in broken and "in force again" in again and "attributes has 'kindness'" in misfit


def test_a_policy_that_is_none_ends_it_before_anything_starts(monkeypatch, tmp_path):
    (tmp_path / "policy.yaml").write_text("keys: []")
    launch, settings = FakeLaunch(None), settings_of(None, [str(exported(tmp_path / "m"))], [], str(tmp_path / "policy.yaml"), [])
    monkeypatch.setattr("ctrlray.serve.launch", launch, raising=False)
    with pytest.raises(ConfigError, match="at least 1 item"):
        command.serve_until_stopped(settings, "0.0.0.0", 8123)
    assert launch.asked == []


@pytest.mark.parametrize(
    "words, message",
    [
        (([], [], None, []), "no model"),
        (([], ["exmate"], None, []), "needs the name of a run"),
        ((["a"], [], None, ["replica.max=1"]), "unknown key"),
        ((["a"], [], None, ["replicas.min=2"]), "raise max"),
        ((["a"], [], None, ["replicas.gpus=2"]), "must be the same"),
        ((["a"], [], None, ["ingress.max_held_bytes=2000"]), "is less than max_body_bytes=10000000"),
    ],
)
def test_settings_that_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(None, *words)


def test_an_exported_folder(tmp_path):
    (entry,) = resolve({"model": str(exported(tmp_path / "mine"))}).entries
    assert (entry.name, entry.max_context, entry.method, entry.coded) == ("mine", 512, "exmate", True)
    assert [r.name for r in entry.dial.ranges] == ["safety"] and entry.local() == tmp_path / "mine"
    assert resolve({"model": str(tmp_path / "mine"), "name": "x"}, max_context=100).entries[0].max_context == 100


def test_an_exported_folder_of_object_storage_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = exported(tmp_path / "there")
    (entry,) = resolve({"model": there.as_uri()}).entries
    assert entry.name == "there" and not (tmp_path / "cache" / "ctrlray" / "fetched" / entry.folder).exists()
    folder = entry.local()
    assert (folder / "model.safetensors").read_bytes() == b"weights" and folder != there
    (there / "model.safetensors").write_bytes(b"others!")  # other files have another folder
    os.utime(there / "model.safetensors", (1, 1))
    assert entry.local() == folder and (folder / "model.safetensors").read_bytes() == b"weights"
    assert resolve({"model": there.as_uri()}).entries[0].folder != entry.folder
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_models_that_are_not_served(tmp_path):
    mine, plain = str(exported(tmp_path / "mine")), tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    for sources, settings, message in (
        ([{"model": str(plain)}], {}, "a model without a dial"),
        ([{"model": "no-such-run"}], {}, "no run at"),
        ([{"model": mine}, {"model": mine}], {}, "two models have the name 'mine'"),
        ([{"model": mine, "methods": ["exmate"]}], {}, "methods are of runs"),
        ([{"model": mine}], {"rewards": True}, "needs a run among the models"),
        ([{"model": str(exported(tmp_path / "start", method="start"))}], {}, "knows no control codes"),
        ([{"model": str(exported(tmp_path / "a b"))}], {}, "cannot be a model's name"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(*sources, **settings)


class Transport(asyncio.Transport):
    """Keeps when it was closed."""

    def __init__(self, loop):
        super().__init__()
        self.loop, self.begun, self.closed = loop, loop.time(), None

    def close(self):
        self.closed = self.closed or self.loop.time() - self.begun

    def is_closing(self):
        return self.closed is not None

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data):
        pass

    def set_protocol(self, protocol):
        pass

    def resume_reading(self):
        pass

    def pause_reading(self):
        pass


async def connection(monkeypatch, pieces, pause_s=0.05, timeout_s=0.2):
    """When a connection that sends these pieces is closed, in s; None if it is not."""
    from uvicorn import Config
    from uvicorn.server import ServerState

    monkeypatch.setattr(edge, "HEADER_TIMEOUT_S", timeout_s)

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = Config(app, http=edge.PatientProtocol, log_config=None)
    config.load()
    protocol = edge.PatientProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    transport = Transport(asyncio.get_running_loop())
    protocol.connection_made(transport)
    for piece in pieces:
        if not transport.is_closing():
            protocol.data_received(piece)
        await asyncio.sleep(pause_s)
    closed = transport.closed
    protocol.connection_lost(None)
    return closed


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"


TRICKLE = [bytes([c]) for c in HEAD[:7]]


@pytest.mark.parametrize("pieces", [[b""] * 8, TRICKLE, [HEAD + b"abc", *TRICKLE]])
def test_headers_that_take_too_long_end_the_connection(monkeypatch, pieces):
    closed = unhurried(connection(monkeypatch, pieces))
    assert closed is not None and closed >= 0.2


def test_headers_in_time_and_slow_bodies_are_none_of_its_business(monkeypatch):
    assert unhurried(connection(monkeypatch, [HEAD[:9], HEAD[9:], *[b""] * 8])) is None


def test_endless_headers_end_the_connection(monkeypatch):
    closed = unhurried(connection(monkeypatch, [b"GET / HTTP/1.1\r\n", *[b"X: " + b"x" * 9000 + b"\r\n"] * 9], 0.0, 60.0))
    assert closed is not None


def test_the_serve_config_is_one():
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.safe_load((Path(__file__).parent.parent.parent / "cluster" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(raw).applications
    assert parse(ServeSettings, application.args, where="args").replicas.max == 4
