"""Streams of frames on a gateway with all rooms in one process, over gRPC: what clients see, and what Generate has to do with it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest

from sdxs import rpc
from sdxs.client import AsyncClient, Client
from sdxs.control import Control
from sdxs.embedded import free_port
from sdxs.errors import InvalidRequest, NotFound, Overloaded, PreconditionFailed, Unavailable
from sdxs.streaming import METHOD, Drawn, Dropped, Event, Failed, Phase
from sdxs.v1 import gateway_pb2, gateway_pb2_grpc, stream_pb2
from services.local import serve_local
from services.settings import ServingSettings
from tests.controlnets import drawing
from tests.streams import DEADLINE, GOODBYE, OVERTAKEN, change, control, frame, opening, said

PROMPT = "red apple"
SKETCH, OTHER = Control(drawing(), "edge"), Control(drawing((50, 70)), "colour", scale=0.5)


@contextlib.asynccontextmanager
async def served(bundle: Path, address: str = "", **values: Any) -> AsyncIterator[str]:
    """The address of a server in this loop."""
    address = address or f"127.0.0.1:{free_port()}"
    fields = {"redis_url": "", "gateway_address": address, "drain_s": 5, **values}
    async with serve_local(str(bundle), ServingSettings(**fields)):
        async with AsyncClient(address) as client:
            await client.wait_ready(60)
        yield address


@pytest.fixture(scope="module")
def address(control_bundle: Path) -> Iterator[str]:
    """Of a server in a thread of its own, for blocking clients."""
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    found = f"127.0.0.1:{free_port()}"

    async def main() -> None:
        async with served(control_bundle, found, max_image_bytes=1 << 20, gateway_max_message_bytes=4 << 20):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(60)
    yield found
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@contextlib.asynccontextmanager
async def calling(address: str, *requests: stream_pb2.StreamRequest) -> AsyncIterator[Any]:
    """A call as a foreign client makes it, with these requests written."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = gateway_pb2_grpc.GatewayServiceStub(channel).Stream()  # type: ignore[no-untyped-call]
        for request in requests:
            await call.write(request)
        yield call


def never(_: stream_pb2.StreamResponse) -> bool:
    return False


async def heard(call: Any, until: Callable[[stream_pb2.StreamResponse], bool] = never) -> list[stream_pb2.StreamResponse]:
    """All that is said on it, or all up to one message."""
    found: list[stream_pb2.StreamResponse] = []
    async with asyncio.timeout(60):
        while (response := await call.read()) is not grpc.aio.EOF:
            found.append(response)
            if until(response):
                break
    return found


def is_answer(response: stream_pb2.StreamResponse) -> bool:
    return not response.HasField("state")


LOOKS: list[dict[str, Any]] = [
    {}, {"seed": 8}, {"prompt": "pear", "format": "png"}, {"controls": [SKETCH]}, {"controls": [OTHER, SKETCH], "format": "raw"},
    {"init_image": drawing(), "strength": 0.5}, {"controls": [SKETCH], "init_image": drawing(), "strength": 0.7, "format": "webp"},
]  # fmt: skip


def test_a_frames_image_is_the_generated_one(address: str) -> None:
    with Client(address) as client:
        for look in LOOKS:
            asked: dict[str, Any] = {"prompt": PROMPT, "seed": 7, **look}
            with client.stream(**asked) as stream:
                assert stream.send() == 1
                stream.finish()
                events = list(stream)
            [drawn] = [event for event in events if isinstance(event, Drawn)]
            generated = client.generate(**asked)
            assert drawn.image == generated.images[0]
            assert (drawn.seed, drawn.unet_batch) == (generated.receipt.seeds[0], 1)
            assert 0 <= drawn.queued_seconds <= drawn.total_seconds
            assert (events[0], events[-1]) == (Phase("active"), Phase("closed", reason="client"))


def test_frames_and_settings_in_turn(address: str) -> None:
    with Client(address) as client, client.stream(prompt=PROMPT, seed=7, format="png") as stream:
        images: list[bytes] = []
        steps: list[dict[str, Any]] = [{"controls": [SKETCH]}, {"seed": 1}, {}]
        stream.send()
        for event in stream:
            if isinstance(event, Drawn):
                images.append(event.image.data)
                if len(images) == 3:
                    stream.configure(prompt="pear", controls=[SKETCH])
                if not steps:
                    break
                stream.send(**steps.pop(0))
        expected = [
            client.generate(prompt, seed=seed, format="png", controls=controls).images[0].data
            for prompt, seed, controls in ((PROMPT, 7, []), (PROMPT, 7, [SKETCH]), (PROMPT, 1, []), ("pear", 7, [SKETCH]))
        ]
        assert images == expected


async def test_a_burst_ends_with_its_last_frame(address: str) -> None:
    async with calling(address, opening(), *(frame(i, seed=i) for i in range(1, 101)), GOODBYE) as call:
        answers = [said(one) for one in await heard(call) if is_answer(one)]
        assert await call.code() is grpc.StatusCode.OK
    assert sorted(answer[1] for answer in answers) == list(range(1, 101))
    images = [answer[1] for answer in answers if answer[0] == "image"]
    assert images == sorted(images) and images[-1] == 100
    assert {answer[2:] for answer in answers if answer[0] == "dropped"} == {(OVERTAKEN,)}


def test_a_blocking_foreign_client(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
        answers = list(stub.Stream(iter([opening(), frame(1), GOODBYE]), timeout=60))
    assert [said(one) for one in answers] == [("ACTIVE", 0), ("image", 1), ("CLOSED", stream_pb2.CLOSED_REASON_CLIENT)]


async def test_half_closing_says_goodbye_too(address: str) -> None:
    async with calling(address, opening(), frame(1)) as call:
        await call.done_writing()
        assert [said(one) for one in await heard(call)][1:] == [("image", 1), ("CLOSED", stream_pb2.CLOSED_REASON_CLIENT)]


BROKEN = drawing()[:50]
LONG = "a " * 20  # more tokens than the model reads


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([frame(1, controls=[control(BROKEN)])], "frame.controls[0].image"),
        ([frame(1, controls=[control(drawing()), control(drawing(), "smell")])], "frame.controls[1].type"),
        ([change(controls=[control(BROKEN)]), frame(1)], "settings.controls[0].image"),
        ([frame(1, init_image=BROKEN)], "frame.init_image"),
        ([frame(1, init_image=b"x" * (2 << 20))], "frame.init_image"),
        ([frame(1, strength=0.5)], "frame.strength"),
        ([frame(1, prompt=LONG)], "frame.prompt"),
        ([change(prompt=LONG), frame(1)], "settings.prompt"),
        ([frame(1, prompt="")], "frame.prompt"),
    ],
)
async def test_a_frame_that_cannot_be_drawn_names_its_field(
    address: str, requests: list[stream_pb2.StreamRequest], field: str
) -> None:
    async with calling(address, opening(), *requests) as call:
        answers = await heard(call, is_answer)
        assert said(answers[-1]) == ("error", 1, "INVALID_ARGUMENT", field)
        await call.write(change(prompt=PROMPT, controls=[]))
        await call.write(frame(2))
        assert said((await heard(call, is_answer))[-1]) == ("image", 2)


MISUSE: list[tuple[list[stream_pb2.StreamRequest | bytes], str, str]] = [
    ([frame(1)], "INVALID_ARGUMENT", "open"),
    ([], "INVALID_ARGUMENT", "open"),
    ([opening(model="nobody")], "NOT_FOUND", "open.model"),
    ([opening(seed=-1)], "INVALID_ARGUMENT", "open.settings.seed"),
    ([opening(resume_token="forged")], "INVALID_ARGUMENT", "open.resume_token"),
    ([opening(), opening()], "INVALID_ARGUMENT", "open"),
    ([opening(), frame(1), frame(1)], "INVALID_ARGUMENT", "frame.id"),
    ([opening(), b"\xff" * 20], "INVALID_ARGUMENT", "request"),
    ([opening(), b"\x1a\x02\xff\xff"], "INVALID_ARGUMENT", "frame"),
    ([opening(), frame(1, init_image=b"x" * (5 << 20))], "RESOURCE_EXHAUSTED", ""),
]


@pytest.mark.parametrize(("requests", "code", "field"), MISUSE)
def test_misuse_ends_the_call_and_says_why(
    address: str, requests: list[stream_pb2.StreamRequest | bytes], code: str, field: str
) -> None:
    encoded = [one if isinstance(one, bytes) else one.SerializeToString() for one in requests]
    with grpc.insecure_channel(address) as channel:
        method: Any = channel.stream_stream(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            list(method(iter(encoded), timeout=60))
    error: Any = caught.value
    assert error.code().name == code
    assert [violation.field for violation in rpc.violations(error.trailing_metadata())] == ([field] if field else [])


async def test_a_deadline_and_the_clients_own_errors(address: str) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(InvalidRequest, match="format"):
            client.stream(prompt=PROMPT, format="tiff")
        async with client.stream(prompt=PROMPT) as stream:
            with pytest.raises(InvalidRequest, match=r"controls\[0\]"):
                await stream.send(controls=["apple"])  # type: ignore[list-item]
            await stream.send(timeout=0)
            await stream.configure(seed=-1)
            await stream.finish()
            with pytest.raises(PreconditionFailed):
                await stream.send()
            events = [event async for event in stream]
    assert Dropped(1, "deadline") in events
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.frame_id, failed.error.field, type(failed.error)) == (0, "settings.seed", InvalidRequest)
    async with AsyncClient(address) as client, client.stream(model="nobody") as refused:
        with pytest.raises(NotFound) as caught:
            await anext(aiter(refused))
    assert caught.value.field == "open.model"


async def test_reflection_and_unary_calls_beside_streams(control_bundle: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        address = await stack.enter_async_context(served(control_bundle, gateway_max_in_flight=1))
        for _ in range(5):
            call = await stack.enter_async_context(calling(address, opening()))
            await call.read()
        client = await stack.enter_async_context(AsyncClient(address))
        assert (await client.generate(PROMPT)).images, "idle sessions are no calls in flight"


async def test_places_are_given_in_turn_and_freed_by_who_leaves(control_bundle: Path) -> None:
    limits: dict[str, Any] = {"stream_max_sessions": 1, "stream_max_queued": 2}
    async with served(control_bundle, **limits) as address, calling(address, opening()) as third:
        assert said(await third.read()) == ("ACTIVE", 0)
        async with calling(address, opening(), frame(1)) as second:
            assert said(await second.read()) == ("QUEUED", 1)
            async with calling(address, opening()) as first:
                assert said(await first.read()) == ("QUEUED", 2)
                async with AsyncClient(address) as client, client.stream() as refused:
                    with pytest.raises(Overloaded):
                        await anext(aiter(refused))
            await third.write(frame(1))
            assert said(await third.read()) == ("image", 1)
            third.cancel()
            assert [said(await second.read()) for _ in range(2)] == [("ACTIVE", 0), ("image", 1)]


async def test_draining_tells_and_ends(control_bundle: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = contextlib.AsyncExitStack()
        address = await server.enter_async_context(served(control_bundle))
        call = await stack.enter_async_context(calling(address, opening()))
        await call.read()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await server.aclose()
        assert loop.time() - began < 4, "a session that holds nothing ends at once"
        states = [said(one) for one in await heard(call)]
        assert states == [("DRAINING", 0), ("CLOSED", stream_pb2.CLOSED_REASON_DRAINED)]
        assert await call.code() is grpc.StatusCode.OK


async def one_drawn(events: AsyncIterator[Event]) -> tuple[Drawn, list[Event]]:
    """The next image, and what was told before it."""
    before: list[Event] = []
    async with asyncio.timeout(60):
        async for event in events:
            if isinstance(event, Drawn):
                return event, before
            before.append(event)
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize("secret", ["ours", ""])
async def test_a_stream_goes_on_on_the_next_server(control_bundle: Path, secret: str) -> None:
    """With the secret by the token, without it because the client knows its settings."""
    address = f"127.0.0.1:{free_port()}"
    async with AsyncClient(address) as client:
        async with served(control_bundle, address, stream_secret=secret):
            expected = (await client.generate("pear", seed=7, format="png", controls=[SKETCH])).images[0]
            stream = await client.stream(prompt=PROMPT, format="png", seed=7).__aenter__()
            events = aiter(stream)
            await stream.configure(prompt="pear", controls=[SKETCH])
            await stream.send()
            assert (await one_drawn(events))[0].image == expected
        assert await stream.send() == 2
        assert await stream.send() == 3
        await asyncio.sleep(0.5)
        async with served(control_bundle, address, stream_secret=secret):
            drawn, before = await one_drawn(events)
            assert (drawn.frame_id, drawn.image) == (3, expected)
            assert Dropped(2, "overtaken") in before or Dropped(2, "closed") in before
            await stream.finish()
            rest = [event async for event in events]
            assert rest[-1] == Phase("closed", reason="client")
        await stream.__aexit__(None, None, None)


async def test_a_token_on_another_server(control_bundle: Path) -> None:
    async with served(control_bundle, stream_secret="ours") as address, calling(address, opening(), frame(7), GOODBYE) as call:
        token = (await heard(call))[-1].state.resume_token
    async with served(control_bundle, stream_secret="ours") as address:
        async with calling(address, opening(resume_token=token), frame(8), GOODBYE) as call:
            answers = await heard(call)
        assert answers[1].image.seed == 7 and answers[0].state.last_answered == 7
        async with AsyncClient(address) as client:
            assert answers[1].image.image.data == (await client.generate(PROMPT, seed=7)).images[0].data


def test_a_blocking_stream_looks_for_a_server_and_gives_up() -> None:
    with Client(f"127.0.0.1:{free_port()}") as client, client.stream(prompt=PROMPT, patience=0.3) as stream:
        stream.send()
        with pytest.raises(Unavailable):
            list(stream)


def test_a_blocking_stream_goes_on_too(control_bundle: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    start, stop = threading.Semaphore(0), threading.Semaphore(0)

    async def serve() -> None:
        for _ in range(2):
            async with served(control_bundle, address):
                start.release()
                await asyncio.to_thread(stop.acquire)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert start.acquire(timeout=60)
        with Client(address) as client, client.stream(prompt=PROMPT, seed=7) as stream:
            stream.send()
            drawn: list[int] = []
            for event in stream:
                if isinstance(event, Drawn):
                    drawn.append(event.frame_id)
                    if len(drawn) == 1:
                        stop.release()
                        threading.Timer(0.5, stream.send).start()
                    else:
                        stream.finish()
            assert drawn == [1, 2]
    finally:
        stop.release(2)
        thread.join()


def noise(side: int, seed: int) -> bytes:
    """A PNG of about 3 side^2 bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


async def test_a_client_that_does_not_read_costs_a_bounded_amount(control_bundle: Path) -> None:
    """250 frames of 1 MB: none is kept but the last and those in hand."""
    async with served(control_bundle) as address, calling(address, opening(strength=0.5)) as call:
        image = noise(600, 1)
        for i in range(1, 10):
            await call.write(frame(i, init_image=image))
        await asyncio.sleep(1)
        before = resident_mb()
        for i in range(10, 250):
            await call.write(frame(i, init_image=image))
        assert resident_mb() - before < 80
        await call.write(GOODBYE)
        answers = [said(one) for one in await heard(call) if is_answer(one)]
    assert sorted(answer[1] for answer in answers) == list(range(1, 250)) and answers[-1] == ("image", 249)


def similar(level: int) -> bytes:
    """A grey file."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), (level,) * 3).save(file, "PNG")
    return file.getvalue()


async def test_similar_frames_are_skipped_and_say_whose_image_stands(control_bundle: Path) -> None:
    """Threshold 3 against the last drawn frame; after four skips one is drawn."""
    frames: list[tuple[dict[str, Any], Any]] = [
        ({"init_image": similar(100)}, "image"), ({"init_image": similar(102)}, 1), ({"init_image": similar(103)}, 1),
        ({"init_image": similar(104)}, "image"), ({"init_image": similar(104), "seed": 8}, "image"),
        ({"init_image": similar(104), "prompt": "pear"}, "image"), ({"init_image": similar(104), "strength": 0.25}, "image"),
        ({}, "image"), ({}, 8), ({}, 8), ({}, 8), ({}, 8), ({}, "image"), ({}, 13), ({"controls": [control(similar(9))]}, "image"),
        ({"controls": [control(similar(9), "colour")]}, "image"), ({"controls": [control(similar(7), "colour")]}, 16),
        ({"controls": [control(BROKEN)]}, "error"), ({"controls": [control(similar(7), "colour")]}, 16),
    ]  # fmt: skip
    async with (
        served(control_bundle, stream_similarity=3, stream_max_skips=4) as address,
        calling(address, opening(strength=0.5)) as call,
    ):
        await call.read()
        for i, (fields, expected) in enumerate(frames, 1):
            await call.write(frame(i, **fields))
            answer = await call.read()
            if isinstance(expected, int):
                assert said(answer) == ("dropped", i, stream_pb2.DROP_REASON_SIMILAR), i
                assert answer.dropped.standing_frame_id == expected
            else:
                assert said(answer)[:2] == (expected, i)


async def test_frames_expire_while_a_slow_one_is_drawn(address: str) -> None:
    async with calling(address, opening(), frame(1), frame(2, timeout=0), GOODBYE) as call:
        answers = {said(one) for one in await heard(call) if is_answer(one)}
    assert answers == {("image", 1), ("dropped", 2, DEADLINE)}


def test_models_and_streams_share_their_names(address: str) -> None:
    with Client(address) as client:
        [model] = client.list_models()
        for name in (model.name, model.digest):
            with client.stream(model=name, prompt=PROMPT) as stream:
                stream.send()
                assert any(isinstance(event, Drawn) for event in iter_until_drawn(stream))


def iter_until_drawn(events: Any) -> Iterator[Event]:
    for event in events:
        yield event
        if isinstance(event, Drawn):
            return


def test_a_request_is_no_stream(address: str) -> None:
    """The generic handler knows which rpc streams."""
    with grpc.insecure_channel(address) as channel:
        unary: Any = channel.unary_unary("/sdxs.v1.GatewayService/Generate")
        request = gateway_pb2.GenerateRequest(prompt=PROMPT, seed=7).SerializeToString()
        assert gateway_pb2.GenerateResponse.FromString(unary(request, timeout=60)).images


@pytest.mark.slow
async def test_a_silent_session_stays_though_its_client_pings(control_bundle: Path) -> None:
    """HTTP/2 pings, which notice a peer that has vanished, are no abuse to our server: four of them, and the session is there."""
    options = [("grpc.keepalive_time_ms", 6_000), ("grpc.keepalive_timeout_ms", 5_000)]
    async with served(control_bundle) as address, grpc.aio.insecure_channel(address, options=options) as channel:
        call: Any = gateway_pb2_grpc.GatewayServiceStub(channel).Stream()  # type: ignore[no-untyped-call]
        await call.write(opening())
        await call.read()
        await asyncio.sleep(32)
        await call.write(frame(1))
        assert said(await call.read()) == ("image", 1)
