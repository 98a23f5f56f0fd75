"""Lines between replicas, over a real gRPC server in this process. What a PeerSet makes of them: test_peers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxs.errors import DeadlineExceeded, Internal, InvalidRequest, Overloaded
from sdxs.v1 import line_pb2, text_encoder_pb2
from services.fabric.deadline import Deadline, Priority
from services.fabric.endpoint import Endpoint
from services.fabric.lines import BrokenLine, Line, NoLine
from services.fabric.server import DataPlane

DESCRIPTOR = text_encoder_pb2.DESCRIPTOR.services_by_name["TextEncoderService"]


class Room:
    """Answers a prompt with itself: "wait" when it is let go, "bad" with an error, others at once."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.waiting = self.cancelled = 0
        self.asked: list[Deadline] = []

    async def encode(self, request: text_encoder_pb2.EncodeRequest, deadline: Deadline) -> text_encoder_pb2.EncodeResponse:
        self.asked.append(deadline)
        if request.prompt == "bad":
            raise InvalidRequest("prompt", "bad", "good ones")
        if request.prompt == "bug":
            raise ZeroDivisionError("secret")
        if request.prompt.startswith("wait"):
            self.waiting += 1
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.waiting -= 1
        return text_encoder_pb2.EncodeResponse(model_digest=request.prompt)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the room is in this process
            await asyncio.sleep(0.005)


async def ask(line: Line, prompt: str, deadline: Deadline | None = None) -> str:
    payload = text_encoder_pb2.EncodeRequest(prompt=prompt).SerializeToString()
    answer = await line.call("Encode", payload, deadline or Deadline.after(10))
    return text_encoder_pb2.EncodeResponse.FromString(answer).model_digest


@contextlib.asynccontextmanager
async def opened(room: Room, lines: bool = True, max_in_flight: int = 8) -> AsyncIterator[tuple[DataPlane, Line]]:
    plane = DataPlane(Endpoint(DESCRIPTOR, room, max_in_flight), 4 << 20, lines)
    await plane.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(plane.address) as channel:
        line = Line(channel, 1 << 20)
        try:
            yield plane, line
        finally:
            await line.hang_up(0)
            await plane.drain(0)


async def test_answers_come_as_they_are_ready_each_to_its_caller() -> None:
    room = Room()
    async with opened(room) as (_, line):
        slow = asyncio.create_task(ask(line, "wait"))
        await until(lambda: room.waiting)
        assert [await ask(line, str(i)) for i in range(50)] == [str(i) for i in range(50)]
        assert not slow.done()
        room.let_go.set()
        assert await slow == "wait"


async def test_class_tenant_and_deadline_go_along() -> None:
    room = Room()
    async with opened(room) as (_, line):
        await ask(line, "a", Deadline.after(5, Priority.HIGH, "acme"))
        await ask(line, "a", Deadline())
    high, plain = room.asked
    assert (high.priority, high.tenant) == (Priority.HIGH, "acme") and 4 < (high.remaining() or 0) < 5
    assert plain.remaining() is None and (plain.priority, plain.tenant) == (Priority.NORMAL, "")


async def test_errors_are_those_of_the_room() -> None:
    room = Room()
    async with opened(room, max_in_flight=1) as (_, line):
        with pytest.raises(InvalidRequest) as bad:
            await ask(line, "bad")
        assert (bad.value.field, bad.value.allowed) == ("prompt", "good ones")
        with pytest.raises(Internal) as bug:
            await ask(line, "bug")
        assert "secret" not in str(bug.value)
        with pytest.raises(Overloaded, match="1048"):
            await ask(line, "x" * (1 << 20))
        busy = asyncio.create_task(ask(line, "wait"))
        await until(lambda: room.waiting)
        with pytest.raises(Overloaded) as full:
            await ask(line, "a")
        assert full.value.retry_after_s is not None
        room.let_go.set()
        await busy
        assert await ask(line, "a") == "a", "errors do not end the line"


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
async def test_work_that_nobody_waits_for_is_stopped(how: str) -> None:
    room = Room()
    async with opened(room) as (_, line):
        call = asyncio.create_task(ask(line, "wait", Deadline.after(0.2 if how == "deadline" else 10)))
        await until(lambda: room.waiting)
        if how == "cancelled":
            call.cancel()
        with pytest.raises(DeadlineExceeded if how == "deadline" else asyncio.CancelledError):
            await call
        await until(lambda: room.cancelled)
        assert await ask(line, "a") == "a"


async def test_a_draining_server_answers_what_it_has_and_begins_nothing() -> None:
    room = Room()
    async with opened(room) as (plane, line):
        before = asyncio.create_task(ask(line, "wait"))
        await until(lambda: room.waiting)
        draining = asyncio.create_task(plane.drain(5))
        await asyncio.sleep(0.1)
        with pytest.raises(BrokenLine):
            await ask(line, "a")
        room.let_go.set()
        assert await before == "wait"
        async with asyncio.timeout(2):
            await draining
            await until(lambda: line.ended)
    assert len(room.asked) == 1


async def test_an_idle_line_does_not_hold_up_a_draining_server() -> None:
    async with opened(Room()) as (plane, line):
        await ask(line, "a")
        async with asyncio.timeout(2):
            await plane.drain(30)


async def test_a_broken_connection_ends_every_call() -> None:
    room = Room()
    async with opened(room) as (plane, line):
        calls = [asyncio.create_task(ask(line, "wait")) for _ in range(3)]
        await until(lambda: room.waiting == 3)
        await plane.drain(0)
        assert all(isinstance(error, BrokenLine) for error in await asyncio.gather(*calls, return_exceptions=True))
        with pytest.raises(BrokenLine):
            await ask(line, "a")
    assert room.cancelled == 3


async def test_a_client_that_leaves_stops_its_calls() -> None:
    room = Room()
    async with opened(room) as (_, line):
        call = asyncio.create_task(ask(line, "wait"))
        await until(lambda: room.waiting)
        await line.hang_up(0)
        with pytest.raises(BrokenLine):
            await call
        await until(lambda: room.cancelled)


async def test_a_server_without_lines_says_so() -> None:
    async with opened(Room(), lines=False) as (_, line):
        with pytest.raises(NoLine):
            await ask(line, "a")


@given(st.lists(st.sampled_from(["a", "bad", "wait", "cancel", "late"]), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
async def test_whatever_is_called_every_call_ends_as_it_should(kinds: list[str]) -> None:
    room = Room()
    async with opened(room, max_in_flight=100) as (_, line):
        calls = []
        for number, kind in enumerate(kinds):
            waits = kind in ("wait", "cancel", "late")
            prompt = f"wait {number}" if waits else "bad" if kind == "bad" else str(number)
            calls.append(asyncio.create_task(ask(line, prompt, Deadline.after(0.05 if kind == "late" else 10))))
        await asyncio.sleep(0.1)
        for kind, call in zip(kinds, calls, strict=True):
            if kind == "cancel":
                call.cancel()
        await until(lambda: room.cancelled == kinds.count("cancel") + kinds.count("late"))
        room.let_go.set()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        wanted = {"bad": InvalidRequest, "cancel": asyncio.CancelledError, "late": DeadlineExceeded}
        for number, (kind, end) in enumerate(zip(kinds, ends, strict=True)):
            if kind in wanted:
                assert isinstance(end, wanted[kind])
            else:
                assert end == (f"wait {number}" if kind == "wait" else str(number))


async def test_bytes_that_are_no_call_end_the_line_alone() -> None:
    room = Room()
    async with opened(room) as (plane, line), grpc.aio.insecure_channel(plane.address) as channel:
        method: Any = channel.stream_stream("/sdxs.v1.LineService/Open")
        stream = method(timeout=5)
        await stream.write(b"\xff" * 20)
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        other = method(timeout=5)
        await other.write(line_pb2.OpenRequest(id=1, call=line_pb2.LineCall(method="Nothing")).SerializeToString())
        assert line_pb2.OpenResponse.FromString(await other.read()).error.code == "INTERNAL"
        other.cancel()
        assert await ask(line, "a") == "a"
