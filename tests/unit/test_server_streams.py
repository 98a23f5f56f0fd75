"""Streams of a data plane, and the terms of calls to it, over a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from sdxs.client import AsyncClient, Client
from sdxs.errors import InvalidRequest
from sdxs.v1 import gateway_pb2, stream_pb2
from services.fabric.deadline import Deadline, Priority
from services.fabric.endpoint import Endpoint
from services.fabric.server import DataPlane
from services.gateway.service import DESCRIPTOR

LARGE = stream_pb2.StreamResponse(error=stream_pb2.FrameError(error=stream_pb2.StreamError(message="x" * (2 << 20))))


class Hasty:
    """Ends a stream while a message of it is being written."""

    def __getattr__(self, name: str) -> None:
        """No other rpc of the service is called."""

    async def stream(
        self,
        requests: AsyncIterator[stream_pb2.StreamRequest],
        send: Callable[[stream_pb2.StreamResponse], Awaitable[None]],
        _: Deadline,
    ) -> None:
        await anext(requests)
        writing: asyncio.Future[None] = asyncio.ensure_future(send(LARGE))
        await asyncio.sleep(0.001)
        writing.cancel()
        raise InvalidRequest("frame", "hasty", "patience")


async def test_an_error_reaches_a_client_in_the_middle_of_a_message() -> None:
    plane = DataPlane(Endpoint(DESCRIPTOR, Hasty(), 8), 1 << 20)
    await plane.start("127.0.0.1:0")
    options = [("grpc.max_receive_message_length", 8 << 20)]
    try:
        async with grpc.aio.insecure_channel(plane.address, options=options) as channel:
            method: Any = channel.stream_stream(f"/{DESCRIPTOR.full_name}/Stream")
            for _ in range(5):
                call = method(timeout=10)
                await call.write(stream_pb2.StreamRequest(close=stream_pb2.StreamClose()).SerializeToString())
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while await call.read() is not grpc.aio.EOF:
                        pass
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        await plane.drain(0)


class Listening:
    """A gateway that notes for whom it is called, and ends each call with that."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Priority, str]] = []

    def __getattr__(self, name: str) -> Any:
        async def call(_: object, deadline: Deadline) -> None:
            self.heard.append((name, deadline.priority, deadline.tenant))
            raise InvalidRequest("prompt", name, "nothing")

        return call

    async def drain(self, _: float) -> None:
        """Nobody is left."""

    async def watch_job(self, _: object, deadline: Deadline) -> AsyncIterator[gateway_pb2.WatchJobResponse]:
        self.heard.append(("watch_job", deadline.priority, deadline.tenant))
        yield gateway_pb2.WatchJobResponse(job=gateway_pb2.GetJobResponse(state="JOB_STATE_FAILED"))

    async def stream(self, _: object, __: object, deadline: Deadline) -> None:
        self.heard.append(("stream", deadline.priority, deadline.tenant))
        raise InvalidRequest("open", "", "nothing")


@pytest.mark.parametrize(("options", "expected"), [
    ({}, (Priority.NORMAL, "")), ({"tenant": "acme", "urgency": "high"}, (Priority.HIGH, "acme")),
])  # fmt: skip
async def test_a_clients_tenant_and_class_go_with_every_call(options: dict[str, Any], expected: tuple[Priority, str]) -> None:
    room = Listening()
    plane = DataPlane(Endpoint(DESCRIPTOR, room, 8, 8), 1 << 20)
    await plane.start("127.0.0.1:0")

    def blocking() -> None:
        with Client(plane.address, **options) as client:
            with pytest.raises(InvalidRequest):
                client.generate("a")
            list(client.watch_job("a"))
            with client.stream(prompt="a") as stream, pytest.raises(InvalidRequest):
                list(stream)

    try:
        async with AsyncClient(plane.address, **options) as client:
            with pytest.raises(InvalidRequest):
                await client.generate("a")
            _ = [job async for job in client.watch_job("a")]
            async with client.stream(prompt="a") as stream:
                with pytest.raises(InvalidRequest):
                    await anext(aiter(stream))
        await asyncio.to_thread(blocking)
    finally:
        await plane.drain(0)
    assert room.heard == [(name, *expected) for name in ("generate", "watch_job", "stream")] * 2
