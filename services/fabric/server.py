"""The data plane of one process: a grpc.aio server with one room's endpoint, grpc.health.v1 and reflection.

Knows gRPC; does not know Ray. Errors leave translated (sdxs.rpc); what nobody foresaw leaves as INTERNAL without its text.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sdxs import rpc
from sdxs.errors import SdxsError
from services.fabric.deadline import Deadline
from services.fabric.endpoint import Endpoint

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
Handler = Callable[[Any, Context], Awaitable[Any]]


class DataPlane:
    """A server that answers health checks from the first moment and is SERVING when told so."""

    def __init__(self, endpoint: Endpoint, max_request_bytes: int) -> None:
        self._endpoint = endpoint
        self._service = endpoint.descriptor.full_name
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", max_request_bytes), *rpc.KEEPALIVE_SERVER])
        self._server.add_generic_rpc_handlers((_handlers(endpoint),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((self._service, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.address = ""

    async def start(self, address: str) -> None:
        """Listen on `host:port`; port 0 takes a free one. Raises OSError when the address cannot be had."""
        await self.set_serving(False)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        self.address = f"{address.rpartition(':')[0]}:{port}"
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """What health checks answer, for the server as a whole and for its service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", self._service):
            await self._health.set(name, status)

    async def drain(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls, and `grace_s` seconds for those in flight; streams are told to end."""
        await self.set_serving(False)
        await asyncio.gather(self._server.stop(grace_s), self._endpoint.drain(grace_s))


def _handlers(endpoint: Endpoint) -> grpc.GenericRpcHandler:
    """Byte handlers for each rpc of the endpoint: parsing is ours, so that bad bytes get our error."""
    handlers: dict[str, Any] = {
        method.name: grpc.stream_stream_rpc_method_handler(_translated(method.name, _stream(endpoint, method.name)))
        if method.client_streaming and method.server_streaming
        else grpc.unary_unary_rpc_method_handler(_translated(method.name, _call(endpoint, method.name)))
        for method in endpoint.descriptor.methods
    }
    return grpc.method_handlers_generic_handler(endpoint.descriptor.full_name, handlers)


def _call(endpoint: Endpoint, name: str) -> Handler:
    """One rpc with one answer: the caller's deadline goes in."""

    async def handle(payload: bytes, context: Context) -> bytes:
        return await endpoint.call(name, payload, Deadline.after(context.time_remaining()))

    return handle


def _stream(endpoint: Endpoint, name: str) -> Handler:
    """One rpc that streams both ways; a client that leaves cancels it."""

    async def handle(_: object, context: Context) -> None:
        async with contextlib.aclosing(_payloads(context)) as payloads:
            await endpoint.stream(name, payloads, context.write)

    return handle


async def _payloads(context: Context) -> AsyncGenerator[bytes, None]:
    """What the client sends. grpc.aio's own iterator cannot be closed before its end."""
    while (payload := await context.read()) is not grpc.aio.EOF:  # type: ignore[comparison-overlap]
        yield payload


def _translated(name: str, handler: Handler) -> Handler:
    """The same, its errors as gRPC statuses."""

    async def handle(incoming: Any, context: Context) -> Any:
        try:
            return await handler(incoming, context)
        except SdxsError as error:
            logger.info("%s: %s: %s", name, error.code, error)
            await context.abort(*rpc.to_status(error))
        except Exception:
            logger.exception("%s failed", name)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")
        raise AssertionError("abort raises")

    return handle
