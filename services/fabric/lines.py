"""A line: calls to one replica on a stream that stays open (sdxs.v1.LineService).

What a call costs in gRPC is mostly its opening and its end: an echo took 0.11 ms on an open stream and 0.44 as a call of its own, with
pauses between them, as a real-time client makes them, 0.43 and 1.15 (2-core virtual machine). A line ends when its client
hangs up, the connection breaks, or the server drains, which first answers the calls it has.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from sdxs import rpc
from sdxs.errors import DeadlineExceeded, Internal, Overloaded, SdxsError
from sdxs.v1 import line_pb2
from services.fabric.deadline import Deadline, Priority
from services.fabric.endpoint import Endpoint, parse

logger = logging.getLogger(__name__)

SERVICE = line_pb2.DESCRIPTOR.services_by_name["LineService"].full_name
MAX_PAYLOAD = 1 << 20
"""Bytes. On a line a larger request would hold up those behind it."""


_ENVELOPE = 64  # bytes of an answer's message that are not its payload


class BrokenLine(Exception):
    """It has ended without an answer; whether the call was begun is not known."""


class NoLine(Exception):
    """The server does not offer lines."""


class Line:
    """The client's end, over a channel that takes messages of `max_answer_bytes`. Opens at once; of no more use when it has `ended`."""

    def __init__(self, channel: grpc.aio.Channel, max_answer_bytes: int) -> None:
        self._max_answer_bytes = max_answer_bytes
        method: Any = channel.stream_stream(f"/{SERVICE}/Open")
        self._stream = method()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[line_pb2.OpenResponse]] = {}
        self._unsent: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]
        self.ended = False

    async def call(self, name: str, payload: bytes, deadline: Deadline) -> bytes:
        """One rpc. Raises SdxsError, BrokenLine, or NoLine."""
        if self.ended:
            raise BrokenLine
        number, answered = next(self._ids), asyncio.get_running_loop().create_future()
        left = deadline.remaining()
        priority = "" if deadline.priority is Priority.NORMAL else deadline.priority.value
        asked = line_pb2.LineCall(
            method=name,
            payload=payload,
            timeout_seconds=left,
            priority=priority,
            tenant=deadline.tenant,
            max_answer_bytes=self._max_answer_bytes - _ENVELOPE,
        )
        self._waiting[number] = answered
        self._say(line_pb2.OpenRequest(id=number, call=asked))
        try:
            async with asyncio.timeout(left):
                return _payload(await answered)
        except TimeoutError:
            raise DeadlineExceeded(f"{name} did not end in time") from None
        finally:
            del self._waiting[number]
            if not answered.done() or answered.cancelled():
                self._say(line_pb2.OpenRequest(id=number, cancel=line_pb2.LineCancel()))

    async def hang_up(self, grace_s: float) -> None:
        """When the calls on it have ended, or so many seconds have passed."""
        if self._waiting and not self.ended:
            await asyncio.wait(list(self._waiting.values()), timeout=grace_s)
        self._stream.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _say(self, request: line_pb2.OpenRequest) -> None:
        self._unsent.put_nowait(request.SerializeToString())

    async def _write(self) -> None:
        """One message after the other: gRPC takes no second one before the first is written."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader says so
            while True:
                await self._stream.write(await self._unsent.get())

    async def _read(self) -> None:
        """Hand out answers until the end."""
        why: Exception = BrokenLine()
        try:
            while (payload := await self._stream.read()) is not grpc.aio.EOF:
                answer = line_pb2.OpenResponse.FromString(payload)
                answered = self._waiting.get(answer.id)
                if answered is not None and not answered.done():
                    answered.set_result(answer)
            if await self._stream.code() is grpc.StatusCode.UNIMPLEMENTED:
                why = NoLine()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                why = NoLine()
        finally:
            self.ended = True
            for answered in self._waiting.values():
                if not answered.done():
                    answered.set_exception(why)


def _payload(answer: line_pb2.OpenResponse) -> bytes:
    """The answer's payload. Raises its error."""
    if answer.WhichOneof("kind") == "payload":
        return answer.payload
    error = answer.error
    if not error.status:
        raise BrokenLine
    raise rpc.from_status(error.code, error.message, ((rpc.DETAILS_KEY, error.status),))


class Lines:
    """The server's ends of all lines to one endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Answer the calls there are, begin none."""
        self._ending.set()

    async def serve(self, payloads: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]) -> None:
        """One line, until its client hangs up, or `end`. Raises InvalidRequest for bytes that are no call, and what `write` raises."""
        calls: dict[int, asyncio.Task[None]] = {}
        unsent: asyncio.Queue[bytes] = asyncio.Queue()
        writing = asyncio.create_task(_write_all(unsent, write))
        reading = asyncio.create_task(self._read_all(payloads, calls, unsent))
        ending = asyncio.create_task(self._ending.wait())
        try:
            done, _ = await asyncio.wait([writing, reading, ending], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if done == {ending}:
                while calls:
                    await asyncio.wait(list(calls.values()))
                await asyncio.wait([writing, asyncio.create_task(unsent.join())], return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [writing, reading, ending, *calls.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_all(
        self, payloads: AsyncIterator[bytes], calls: "dict[int, asyncio.Task[None]]", unsent: "asyncio.Queue[bytes]"
    ) -> None:
        """Begin calls, and stop those whose caller has left."""
        async for payload in payloads:
            request = parse(line_pb2.OpenRequest, payload)
            number = request.id
            if request.HasField("call"):
                calls[number] = asyncio.create_task(self._answer(number, request.call, unsent))
                calls[number].add_done_callback(functools.partial(_forget, calls, number))
            elif number in calls:
                calls[number].cancel()

    async def _answer(self, number: int, asked: line_pb2.LineCall, unsent: "asyncio.Queue[bytes]") -> None:
        """One call to its answer."""
        answer = line_pb2.OpenResponse(id=number)
        try:
            if self._ending.is_set():
                answer.error.code = grpc.StatusCode.UNAVAILABLE.name
            else:
                answer.payload = await self._call(asked)
        except SdxsError as error:
            logger.info("%s: %s: %s", asked.method, error.code, error)
            answer.error.CopyFrom(_error(error))
        except Exception:
            logger.exception("%s failed", asked.method)
            answer.error.CopyFrom(_error(Internal("internal error; the server's log has it")))
        unsent.put_nowait(answer.SerializeToString())

    async def _call(self, asked: line_pb2.LineCall) -> bytes:
        """Within its deadline."""
        left = asked.timeout_seconds if asked.HasField("timeout_seconds") else None
        deadline = Deadline.after(left, Priority(asked.priority or Priority.NORMAL.value), asked.tenant)
        try:
            async with asyncio.timeout(left) as limit:
                payload = await self._endpoint.call(asked.method, asked.payload, deadline)
        except TimeoutError:
            if limit.expired():
                raise DeadlineExceeded(f"{asked.method} did not end in time") from None
            raise
        if len(payload) > asked.max_answer_bytes:
            raise Overloaded(f"the answer has {len(payload)} bytes, the caller takes {asked.max_answer_bytes}")
        return payload


def _forget(calls: "dict[int, asyncio.Task[None]]", number: int, _: object) -> None:
    """A call that has ended."""
    del calls[number]


def _error(error: SdxsError) -> line_pb2.LineError:
    """As a status of its own call would say it."""
    code, message, ((_, status),) = rpc.to_status(error)
    return line_pb2.LineError(code=code.name, message=message, status=status)


async def _write_all(unsent: "asyncio.Queue[bytes]", write: Callable[[bytes], Awaitable[None]]) -> None:
    """For as long as the line lasts."""
    while True:
        await write(await unsent.get())
        unsent.task_done()
