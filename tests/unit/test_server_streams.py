"""Streams of a data plane, over a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from sdxs.errors import InvalidRequest
from sdxs.v1 import stream_pb2
from services.fabric.deadline import Deadline
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
