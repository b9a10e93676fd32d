"""Calls over gRPC by Ray Serve's own client and server, without a cluster: errors, cancellation and size of messages."""

from __future__ import annotations

import asyncio
import gc
import inspect
from contextlib import aclosing, asynccontextmanager

import grpc
import pytest
from ray import ActorID
from ray.serve._private import constants
from ray.serve._private.common import RequestMetadata
from ray.serve._private.handle_options import DynamicHandleOptions
from ray.serve._private.replica import _wrap_grpc_call
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import gRPCReplicaWrapper
from ray.serve.config import ControllerOptions
from ray.serve.generated.serve_pb2_grpc import ASGIServiceServicer, ASGIServiceStub, add_ASGIServiceServicer_to_server
from ray.serve.handle import DeploymentResponseGenerator

from ctrlray.errors import ConfigError
from ctrlray.serve import transport
from ctrlray.serve.catalog import environment
from ctrlray.serve.handles import ReplicaEngine
from ctrlray.serve.refusal import Refusal

LONGEST = [("grpc.max_receive_message_length", transport._LONGEST_MESSAGE)]


@pytest.fixture(autouse=True)
def _over_grpc(monkeypatch):
    monkeypatch.setenv(transport.SWITCH, "grpc")


class Replica(ASGIServiceServicer):
    """A replica's gRPC side, its method being `answer`."""

    def __init__(self, answer):
        self.answer, self.orders, self.ended = answer, [], []

    @_wrap_grpc_call
    async def HandleRequestStreaming(self, context, metadata, order):
        assert metadata.call_method == "answer"
        self.orders.append(order)
        try:
            async for item in self.answer(order):
                yield item
        finally:
            self.ended.append(True)


class Handle:
    """A deployment handle whose one replica is at the other end of `stub`."""

    def __init__(self, stub, **options):
        self.stub, self.chosen = stub, options

    def options(self, **options):
        DynamicHandleOptions().copy_and_update(**options)  # Ray knows them all
        return Handle(self.stub, **options)

    def remote(self, order):
        chosen = DynamicHandleOptions(**self.chosen)
        metadata = RequestMetadata(
            "r",
            "i",
            call_method=chosen.method_name,
            is_streaming=chosen.stream,
            _by_reference=chosen._by_reference,
            _on_separate_loop=False,
            request_serialization=chosen.request_serialization,
            response_serialization=chosen.response_serialization,
        )
        assert not metadata._by_reference and metadata.response_serialization == "pickle"
        wrapper = gRPCReplicaWrapper(self.stub, ActorID(b"x" * 16))
        future = asyncio.get_running_loop().create_future()
        future.set_result(wrapper.send_request_python(PendingRequest([order], {}, metadata), with_rejection=False))
        return DeploymentResponseGenerator(future, metadata, _is_router_running_in_separate_loop=False)


@asynccontextmanager
async def serving(answer, options=LONGEST):
    """A replica, its server, and an engine that asks it."""
    replica, server = Replica(answer), grpc.aio.server(options=options)
    add_ASGIServiceServicer_to_server(replica, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield replica, server, ReplicaEngine(Handle(ASGIServiceStub(channel)), 5.0)
    finally:
        await server.stop(None)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def two(order):
    yield ["a"]
    yield ["b", "c"]


def test_an_answer_passes():
    async def scenario():
        async with serving(two) as (replica, _, engine):
            return [batch async for batch in engine.answer({"n": 1})], replica.orders

    assert run(scenario()) == ([["a"], ["b", "c"]], [{"n": 1}])


def failing(error):
    async def answer(order):
        yield ["a"]
        raise error

    return answer


class Local(Exception):
    """What no other process can unpickle: gRPC then breaks the stream off."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


@pytest.mark.parametrize("error", [RuntimeError("secret"), Local("secret"), asyncio.CancelledError()])
def test_errors_of_the_replica_are_503(error):
    async def scenario():
        seen = []
        async with serving(failing(error)) as (_, _, engine):
            with pytest.raises(Refusal) as caught:
                async for batch in engine.answer({}):
                    seen.append(batch)
        return seen, caught.value

    seen, refusal = run(scenario())
    assert seen == [["a"]] and (refusal.status, refusal.code) == (503, "engine_error") and "secret" not in refusal.message


async def endless(order):
    while True:
        yield ["a"]
        await asyncio.sleep(order["pause_s"])


def test_a_server_that_goes_mid_stream_is_503():
    async def scenario():
        async with serving(endless) as (_, server, engine):
            with pytest.raises(Refusal) as caught:
                async for _ in engine.answer({"pause_s": 0.01}):
                    await server.stop(0)
        return caught.value

    assert run(scenario()).code == "engine_error"


@pytest.mark.parametrize("pause_s", [60.0, 0.0])
def test_closing_an_answer_ends_the_replicas_work(pause_s):
    """While the replica waits for its engine, and while it sends."""

    async def scenario():
        async with serving(endless) as (replica, _, engine):
            async with aclosing(engine.answer({"pause_s": pause_s})) as answer:
                assert await anext(answer) == ["a"] and not replica.ended
            for _ in range(200):
                if replica.ended:
                    return True
                gc.collect()
                await asyncio.sleep(0.01)

    assert run(scenario())


def test_messages_are_as_long_as_they_need_to_be():
    """gRPC's own limit is 4 MiB each way."""
    text = "x" * 5 * 2**20

    async def echo(order):
        yield [order["prompt"]]

    async def asked(options):
        async with serving(echo, options) as (_, _, engine):
            return [batch async for batch in engine.answer({"prompt": text})]

    assert run(asked(LONGEST)) == [[text]]
    with pytest.raises(Refusal):
        run(asked([]))


def test_grpc_in_one_loop_unless_told(monkeypatch):
    monkeypatch.delenv(transport.SWITCH)
    assert transport.chosen() == "grpc-inline" and transport.handle_options()["request_serialization"] == "pickle"
    monkeypatch.setenv(transport.SWITCH, "actor")
    before = environment()
    assert transport.handle_options() == {} and not set(transport.environment()) & set(transport._VARIABLES["grpc-inline"])
    monkeypatch.setenv(transport.SWITCH, "pigeon")
    with pytest.raises(ConfigError, match=f"{transport.SWITCH}=pigeon: there are actor, actor-inline, grpc, grpc-inline"):
        transport.chosen()
    for name in ("actor-inline", "grpc", "grpc-inline"):
        monkeypatch.setenv(transport.SWITCH, name)
        carried = transport.environment()
        assert environment() == before | carried and carried[transport.SWITCH] == name
        assert ControllerOptions(runtime_env={"env_vars": carried}).runtime_env["env_vars"] == carried
        for variable, value in carried.items():
            monkeypatch.setenv(variable, value)
        assert transport.environment() == carried  # a replica that starts others hands on the same


def test_ray_serve_reads_what_is_set():
    source = inspect.getsource(constants)
    variables = transport._VARIABLES["grpc-inline"] | transport._UNHURRIED
    assert len(variables) == 7 and all(f'"{name}"' in source for name in variables.keys() - {"grpc_proxy"})
