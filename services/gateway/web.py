"""The stream for browsers: a WebSocket at /v1/stream with the sessions of GatewayService.Stream, on a port of its own.

Binary messages are encoded StreamRequests and StreamResponses, text messages the same as JSON; answers come as the first message came.
What a gRPC call says by its status, the last message and the close code say here.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import uvicorn
from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from sdxs.errors import Internal, InvalidRequest, SdxsError
from sdxs.v1 import stream_pb2
from services.fabric.endpoint import parse
from services.gateway.frames import error_message
from services.gateway.stream import Sessions
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

PATH = "/v1/stream"

# RFC 6455, section 7.4.1, and IANA's registry of close codes.
_NORMAL, _GOING_AWAY, _MALFORMED, _REFUSED, _BROKEN, _TRY_LATER = 1000, 1001, 1007, 1008, 1011, 1013
_CLOSE_CODES = {
    "INVALID_ARGUMENT": _REFUSED,
    "NOT_FOUND": _REFUSED,
    "DEADLINE_EXCEEDED": _REFUSED,
    "RESOURCE_EXHAUSTED": _TRY_LATER,
    "UNAVAILABLE": _TRY_LATER,
}
_MAX_REASON = 123  # bytes; a control frame has no more
_STOP_S = 1  # for connections whose sessions have ended to close


class _Malformed(InvalidRequest):
    """A message that is none."""


class WebServer:
    """Serves the sessions of one gateway, in its event loop."""

    def __init__(self, sessions: Sessions, settings: ServingSettings) -> None:
        self._sessions = sessions
        self._origins = frozenset(filter(None, map(str.strip, settings.http_origins.split(","))))
        self._max_message_bytes = settings.gateway_max_message_bytes
        self._server: _Server | None = None
        self._running: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self, address: str) -> None:
        """Listen on `host:port`; port 0 takes a free one. Raises OSError when the address cannot be had."""
        listening = _listen(address)
        self.address = f"{address.rpartition(':')[0]}:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=[WebSocketRoute(PATH, self._serve)]),
            ws="websockets-sansio",
            ws_max_size=self._max_message_bytes,
            ws_per_message_deflate=False,  # images are compressed already
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_STOP_S,
        )
        self._server = _Server(config)
        self._running = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started and not self._running.done():  # noqa: ASYNC110 - it has no event for it
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Hang up; the sessions should have been drained."""
        if self._server is not None and self._running is not None:
            self._server.should_exit = True
            await self._running

    async def _serve(self, connection: WebSocket) -> None:
        """One connection, one session."""
        if not self._may_call(connection):
            logger.info("refused the origin %s", connection.headers.get("origin"))
            await connection.close(_REFUSED)  # before it is accepted: 403
            return
        await connection.accept()
        wire = _Wire(connection)
        with contextlib.suppress(WebSocketDisconnect):
            try:
                await self._sessions.run(wire.requests(), wire.send)
                await connection.close(wire.close_code)
            except WebSocketDisconnect:
                raise
            except SdxsError as error:
                logger.info("stream: %s: %s", error.code, error)
                await wire.fail(error)
            except Exception:
                logger.exception("a stream failed")
                await wire.fail(Internal("internal error; the server's log has it"))

    def _may_call(self, connection: WebSocket) -> bool:
        """Pages of this host may, those of `http_origins`, and programs, which say no origin."""
        origin = connection.headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return True
        return urlsplit(origin).netloc == connection.headers.get("host")


class _Wire:
    """A connection's messages as the session's."""

    def __init__(self, connection: WebSocket) -> None:
        self._connection = connection
        self._as_text: bool | None = None
        self.close_code = _NORMAL

    async def requests(self) -> AsyncIterator[stream_pb2.StreamRequest]:
        """What the client says. Raises InvalidRequest for what cannot be read, WebSocketDisconnect when it has gone."""
        while True:
            message = await self._connection.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            text, data = message.get("text"), message.get("bytes")
            if self._as_text is None:
                self._as_text = text is not None
            yield _of_bytes(data or b"") if text is None else _of_text(text)

    async def send(self, response: stream_pb2.StreamResponse) -> None:
        """Returns when the connection has room again. Raises WebSocketDisconnect when the client has gone."""
        if response.state.reason == stream_pb2.CLOSED_REASON_DRAINED:
            self.close_code = _GOING_AWAY
        if self._as_text:
            await self._connection.send_text(json_format.MessageToJson(response, indent=None))
        else:
            await self._connection.send_bytes(response.SerializeToString())

    async def fail(self, error: SdxsError) -> None:
        """Last words and the close code."""
        state = stream_pb2.SessionState(
            phase=stream_pb2.SESSION_PHASE_CLOSED, reason=stream_pb2.CLOSED_REASON_ERROR, error=error_message(error)
        )
        await self.send(stream_pb2.StreamResponse(state=state))
        code = _MALFORMED if isinstance(error, _Malformed) else _CLOSE_CODES.get(error.code, _BROKEN)
        reason = f"{error.code}: {error}".encode()[:_MAX_REASON].decode(errors="ignore")
        await self._connection.close(code, reason)


def _of_bytes(data: bytes) -> stream_pb2.StreamRequest:
    try:
        return parse(stream_pb2.StreamRequest, data)
    except InvalidRequest as error:
        raise _Malformed(error.field, error.value, error.allowed) from None


def _of_text(text: str) -> stream_pb2.StreamRequest:
    try:
        return json_format.Parse(text, stream_pb2.StreamRequest())
    except json_format.ParseError as error:
        raise _Malformed("request", str(error), "the JSON of a sdxs.v1.StreamRequest") from None


class _Server(uvicorn.Server):
    """Signals are the program's, not uvicorn's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(address: str) -> socket.socket:
    """Shared with other gateways on this node, as gRPC shares its port."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, reuse_port=True)


@contextlib.asynccontextmanager
async def serving(sessions: Sessions, settings: ServingSettings) -> AsyncIterator[WebServer | None]:
    """A running server; None when the settings give it no address."""
    if not settings.gateway_http_address:
        yield None
        return
    server = WebServer(sessions, settings)
    await server.start(settings.gateway_http_address)
    try:
        yield server
    finally:
        await server.stop()
