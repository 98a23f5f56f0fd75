"""The stream's WebSocket: the sessions of the gRPC call, for browsers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sdxs.client import AsyncClient
from sdxs.embedded import free_port
from sdxs.errors import InvalidRequest
from sdxs.v1 import gateway_pb2_grpc, stream_pb2
from services.local import serve_local
from services.settings import ServingSettings
from tests.controlnets import drawing
from tests.streams import GOODBYE, control, frame, opening, said

PROMPT = "red apple"


@contextlib.asynccontextmanager
async def served(bundle: Path, **values: Any) -> AsyncIterator[ServingSettings]:
    """A server in this loop, with both its addresses."""
    grpc_address, http_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
    fields = {"redis_url": "", "gateway_address": grpc_address, "gateway_http_address": http_address, "drain_s": 5, **values}
    settings = ServingSettings(**fields)
    async with serve_local(str(bundle), settings), AsyncClient(grpc_address) as client:
        await client.wait_ready(60)
        yield settings


def calling(settings: ServingSettings, path: str = "/v1/stream", **options: Any) -> connect:
    return connect(f"ws://{settings.gateway_http_address}{path}", compression=None, max_size=None, **options)


async def hear(socket: ClientConnection) -> list[stream_pb2.StreamResponse]:
    """All that is said, as binary or text, until it is closed."""
    found: list[stream_pb2.StreamResponse] = []
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = await socket.recv()
                response = stream_pb2.StreamResponse()
                if isinstance(message, str):
                    json_format.Parse(message, response)
                else:
                    response.ParseFromString(message)
                found.append(response)
    return found


async def test_the_same_bytes_and_words_as_over_grpc(control_bundle: Path) -> None:
    requests = [opening(format=2), frame(1, controls=[control(drawing())]), GOODBYE]
    async with served(control_bundle) as settings:
        async with grpc.aio.insecure_channel(settings.gateway_address) as channel:
            call: Any = gateway_pb2_grpc.GatewayServiceStub(channel).Stream()  # type: ignore[no-untyped-call]
            for request in requests:
                await call.write(request)
            over_grpc = [one async for one in call]
        for as_text in (False, True):
            async with calling(settings) as socket:
                for request in requests:
                    await socket.send(json_format.MessageToJson(request) if as_text else request.SerializeToString())
                over_web = await hear(socket)
                assert socket.close_code == 1000
            assert [said(one) for one in over_web] == [said(one) for one in over_grpc]
            assert over_web[1].image.image.data == over_grpc[1].image.image.data


async def test_errors_close_with_a_code_and_say_their_field_first(control_bundle: Path) -> None:
    cases: list[tuple[list[str | bytes], int, str, str]] = [
        ([b"\xff" * 20], 1007, "INVALID_ARGUMENT", "request"),
        (["{"], 1007, "INVALID_ARGUMENT", "request"),
        (['{"opening": {}}'], 1007, "INVALID_ARGUMENT", "request"),
        ([frame(1).SerializeToString()], 1008, "INVALID_ARGUMENT", "open"),
        (['{"open": {"model": "nobody"}}'], 1008, "NOT_FOUND", "open.model"),
        ([opening().SerializeToString(), frame(1).SerializeToString(), frame(1).SerializeToString()], 1008, "INVALID_ARGUMENT", "frame.id"),
    ]  # fmt: skip
    async with served(
        control_bundle, gateway_max_message_bytes=100_000, stream_max_sessions=1, stream_max_queued=0
    ) as settings:
        for messages, code, name, field in cases:
            async with calling(settings) as socket:
                for message in messages:
                    await socket.send(message)
                last = (await hear(socket))[-1].state
                assert (last.phase, last.reason) == (stream_pb2.SESSION_PHASE_CLOSED, stream_pb2.CLOSED_REASON_ERROR)
                assert (socket.close_code, last.error.code, last.error.field) == (code, name, field)
                assert socket.close_reason is not None and socket.close_reason.startswith(f"{name}: ")
        async with calling(settings) as socket:
            await socket.send(opening().SerializeToString())
            await socket.send(b"x" * 100_001)
            await hear(socket)
            assert socket.close_code == 1009
        async with calling(settings) as first:
            await first.send(opening().SerializeToString())
            await first.recv()
            async with calling(settings) as second:
                await hear(second)
                assert second.close_code == 1013


async def test_who_leaves_makes_room_and_a_server_that_stops_says_so(control_bundle: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = contextlib.AsyncExitStack()
        settings = await server.enter_async_context(served(control_bundle, stream_max_sessions=1))
        first = await stack.enter_async_context(calling(settings))
        await first.send(opening().SerializeToString())
        await first.recv()
        second = await stack.enter_async_context(calling(settings))
        await second.send(json_format.MessageToJson(opening()))
        assert json.loads(await second.recv())["state"]["phase"] == "SESSION_PHASE_QUEUED"
        await first.close()
        assert json.loads(await second.recv())["state"]["phase"] == "SESSION_PHASE_ACTIVE"
        await server.aclose()
        assert [said(one) for one in await hear(second)] == [("DRAINING", 0), ("CLOSED", stream_pb2.CLOSED_REASON_DRAINED)]
        assert second.close_code == 1001


async def test_pages_of_other_hosts_are_refused(control_bundle: Path) -> None:
    async with served(control_bundle, http_origins="https://ours.example, http://other.example:8080") as settings:
        for origin in (f"http://{settings.gateway_http_address}", "https://ours.example", "http://other.example:8080", None):
            async with calling(settings, origin=origin) as socket:
                await socket.send(opening().SerializeToString())
                await socket.recv()
        for origin in ("http://ours.example", "https://evil.example", "null", "http://127.0.0.1"):
            with pytest.raises(InvalidStatus) as caught:
                async with calling(settings, origin=origin):
                    pass
            assert caught.value.response.status_code == 403
        with pytest.raises(InvalidStatus):
            async with calling(settings, path="/v2/stream"):
                pass


NODE = """
const grpcless = new WebSocket(process.argv[1]);
grpcless.onopen = () => {
  grpcless.send(JSON.stringify({open: {settings: {prompt: "red apple", seed: "7"}}}));
  grpcless.send(JSON.stringify({frame: {id: "1"}}));
  grpcless.send(JSON.stringify({close: {}}));
};
grpcless.onmessage = (event) => {
  const said = JSON.parse(event.data);
  if (said.image) console.log(said.image.image.data);
};
grpcless.onclose = (event) => process.exit(event.code === 1000 ? 0 : 1);
"""


def node_has_websockets() -> bool:
    found = shutil.which("node")
    return (
        found is not None
        and not subprocess.run([found, "--experimental-websocket", "-e", "WebSocket"], capture_output=True).returncode
    )


@pytest.mark.skipif(not node_has_websockets(), reason="no node with WebSocket")
async def test_a_browsers_websocket_in_node(control_bundle: Path) -> None:
    """Node's WebSocket is the browsers' interface."""
    async with served(control_bundle) as settings:
        url = f"ws://{settings.gateway_http_address}/v1/stream"
        command = ["node", "--experimental-websocket", "-e", NODE, url]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        async with AsyncClient(settings.gateway_address) as client:
            expected = (await client.generate(PROMPT, seed=7)).images[0].data
    assert base64.b64decode(done.stdout) == expected


@pytest.mark.parametrize("address", ["8501", "localhost", "127.0.0.1:0"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="SDXS_GATEWAY_HTTP_ADDRESS"):
        ServingSettings(gateway_http_address=address)
