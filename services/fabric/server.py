"""The data plane of one process: a grpc.aio server with one room's endpoint, grpc.health.v1 and reflection.

Knows gRPC; does not know Ray. Errors leave translated (sdxs.rpc); what nobody foresaw leaves as INTERNAL without its text.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sdxs import rpc
from sdxs.errors import InvalidRequest, SdxsError
from services.fabric.deadline import Deadline, Priority
from services.fabric.endpoint import Endpoint
from services.fabric.lines import SERVICE as LINE_SERVICE
from services.fabric.lines import Lines

logger = logging.getLogger(__name__)

_TENANT = re.compile(r"[A-Za-z0-9._-]{0,64}")

_LAST_WRITE_S = 2.0

Context = grpc.aio.ServicerContext[bytes, bytes]


class DataPlane:
    """A server that answers health checks from the first moment and is SERVING when told so; with `lines` it offers these too."""

    def __init__(self, endpoint: Endpoint, max_request_bytes: int, lines: bool = False) -> None:
        self._endpoint = endpoint
        self._lines = Lines(endpoint) if lines else None
        self._service = endpoint.descriptor.full_name
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", max_request_bytes), *rpc.KEEPALIVE_SERVER])
        self._server.add_generic_rpc_handlers((_handlers(endpoint),))
        if self._lines is not None:
            opened: dict[str, Any] = {"Open": grpc.stream_stream_rpc_method_handler(_line(self._lines))}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(LINE_SERVICE, opened),))
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
        if self._lines is not None:
            self._lines.end()
        await asyncio.gather(self._server.stop(grace_s), self._endpoint.drain(grace_s))


def _handlers(endpoint: Endpoint) -> grpc.GenericRpcHandler:
    """Byte handlers for each rpc of the endpoint: parsing is ours, so that bad bytes get our error."""
    handlers: dict[str, Any] = {}
    for method in endpoint.descriptor.methods:
        if method.client_streaming:
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(_stream(endpoint, method.name))
        elif method.server_streaming:
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(_responses(endpoint, method.name))
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(_call(endpoint, method.name))
    return grpc.method_handlers_generic_handler(endpoint.descriptor.full_name, handlers)


def _terms(context: Context) -> Deadline:
    """The caller's deadline, class and tenant. Raises InvalidRequest for metadata that say none."""
    said = {key: value for key, value in context.invocation_metadata() or () if key in (rpc.PRIORITY_KEY, rpc.TENANT_KEY)}
    priority, tenant = said.get(rpc.PRIORITY_KEY, Priority.NORMAL.value), said.get(rpc.TENANT_KEY, "")
    if priority not in {known.value for known in Priority}:
        raise InvalidRequest(rpc.PRIORITY_KEY, priority, ", ".join(known.value for known in Priority))
    if not _TENANT.fullmatch(str(tenant)):
        raise InvalidRequest(rpc.TENANT_KEY, tenant, "up to 64 of A-Z a-z 0-9 . _ -")
    return Deadline.after(context.time_remaining(), Priority(priority), str(tenant))


def _call(endpoint: Endpoint, name: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
    """One rpc with one answer."""

    async def handle(payload: bytes, context: Context) -> bytes:
        async with _translated(name, context):
            return await endpoint.call(name, payload, _terms(context))
        raise AssertionError("abort raises")

    return handle


def _responses(endpoint: Endpoint, name: str) -> Callable[[bytes, Context], AsyncIterator[bytes]]:
    """One with a stream of responses."""

    async def handle(payload: bytes, context: Context) -> AsyncIterator[bytes]:
        async with _translated(name, context):
            stream = endpoint.responses(name, payload, _terms(context))
            async with contextlib.aclosing(stream) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response

    return handle


def _stream(endpoint: Endpoint, name: str) -> Callable[[object, Context], Awaitable[None]]:
    """One that streams both ways; a client that leaves cancels it."""

    async def handle(_: object, context: Context) -> None:
        async with (
            _translated(name, context),
            _whole_writes(context) as write,
            contextlib.aclosing(_payloads(context)) as payloads,
        ):
            await endpoint.stream(name, payloads, write, _terms(context))

    return handle


def _line(lines: Lines) -> Callable[[object, Context], Awaitable[None]]:
    """A line's server end."""

    async def handle(_: object, context: Context) -> None:
        async with (
            _translated("Open", context),
            _whole_writes(context) as write,
            contextlib.aclosing(_payloads(context)) as payloads,
        ):
            await lines.serve(payloads, write)

    return handle


@contextlib.asynccontextmanager
async def _whole_writes(context: Context) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """A write that may be cancelled. gRPC's own goes on when its task is cancelled, and until it is done no status can be sent. A client
    that does not read is not waited for long."""
    writing: asyncio.Future[None] | None = None

    async def write(payload: bytes) -> None:
        nonlocal writing
        writing = asyncio.ensure_future(context.write(payload))
        writing.add_done_callback(lambda write: write.cancelled() or write.exception())  # a client that has left is no news
        await asyncio.shield(writing)

    try:
        yield write
    finally:
        if writing is not None and not writing.done():
            await asyncio.wait([writing], timeout=_LAST_WRITE_S)


async def _payloads(context: Context) -> AsyncGenerator[bytes, None]:
    """What the client sends. grpc.aio's own iterator cannot be closed before its end."""
    while (payload := await context.read()) is not grpc.aio.EOF:  # type: ignore[comparison-overlap]
        yield payload


@contextlib.asynccontextmanager
async def _translated(name: str, context: Context) -> AsyncIterator[None]:
    """Errors leave as statuses."""
    try:
        yield
    except SdxsError as error:
        logger.info("%s: %s: %s", name, error.code, error)
        await context.abort(*rpc.to_status(error))
    except Exception:
        logger.exception("%s failed", name)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")
