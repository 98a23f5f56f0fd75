"""A room's service as bytes in, bytes out: admission, parsing, the room's method, serialising.

The gRPC server and a caller in the same process come in by the same door, so both see the same limits and the same errors.
"""

import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from sdxs.errors import InvalidRequest, Overloaded
from services.fabric.deadline import Deadline
from services.fabric.wire import broken_field

Parsed = TypeVar("Parsed", bound=Message)
Method = Callable[[Any, Deadline], Awaitable[Message]]
Responses = Callable[[Any, Deadline], AsyncIterator[Message]]
Stream = Callable[[AsyncIterator[Any], Callable[[Message], Awaitable[None]], Deadline], Awaitable[None]]
Send = Callable[[bytes], Awaitable[None]]


@runtime_checkable
class Drains(Protocol):
    """A room with calls that last as long as their clients want."""

    async def drain(self, grace_s: float) -> None:
        """Tell them that it is over, return when they have ended or `grace_s` seconds have passed."""
        ...


class Endpoint:
    """One proto service, implemented by an object with a snake_case method per rpc: (request, deadline) -> response.

    That of an rpc with a stream of responses is an async generator; such calls last, so they are counted apart. One that streams both
    ways is (requests, send, deadline), and how many of those there may be is the room's to say: one that waits costs nothing.
    """

    def __init__(self, descriptor: ServiceDescriptor, room: object, max_in_flight: int, max_streams: int = 0) -> None:
        self.descriptor = descriptor
        self.in_flight = 0
        self.streams = 0
        self._busy = 0.0
        self._changed = self._told = time.monotonic()
        self._max_in_flight = max_in_flight
        self._max_streams = max_streams
        self._room = room
        self._methods: dict[str, tuple[type[Message], Any]] = {
            rpc.name: (GetMessageClass(rpc.input_type), getattr(room, _snake_case(rpc.name))) for rpc in descriptor.methods
        }

    async def call(self, name: str, payload: bytes, deadline: Deadline) -> bytes:
        """One call. Raises Overloaded over the limit, InvalidRequest on bytes that do not parse, and what the room raises."""
        if self.in_flight >= self._max_in_flight:
            raise Overloaded(f"{self.in_flight} calls are in flight already, at most {self._max_in_flight} may be")
        request_type, room_method = self._methods[name]
        method: Method = room_method
        self._count(1)
        try:
            response = await method(parse(request_type, payload), deadline)
        finally:
            self._count(-1)
        return response.SerializeToString()

    def load(self) -> float:
        """Mean number of calls in flight since it was last asked for: what comes and goes between two looks is in it too."""
        self._count(0)
        now = time.monotonic()
        mean = self._busy / (now - self._told) if now > self._told else float(self.in_flight)
        self._busy, self._told = 0.0, now
        return mean

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self._busy += self.in_flight * (now - self._changed)
        self._changed = now
        self.in_flight += change

    async def responses(self, name: str, payload: bytes, deadline: Deadline) -> AsyncIterator[bytes]:
        """One call with a stream of responses. Raises as `call` does, and when the caller has left stops the room's generator."""
        if self.streams >= self._max_streams:
            raise Overloaded(f"{self.streams} streams are open already, at most {self._max_streams} may be")
        request_type, room_method = self._methods[name]
        method: Responses = room_method
        self.streams += 1
        try:
            async with contextlib.aclosing(method(parse(request_type, payload), deadline)) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response.SerializeToString()
        finally:
            self.streams -= 1

    async def stream(self, name: str, payloads: AsyncIterator[bytes], send: Send, deadline: Deadline) -> None:
        """One call that streams both ways, until either side ends it. Raises InvalidRequest on bytes that do not parse, and what the room
        raises."""
        request_type, room_method = self._methods[name]
        method: Stream = room_method
        async with contextlib.aclosing(parse(request_type, payload) async for payload in payloads) as requests:
            await method(requests, lambda response: send(response.SerializeToString()), deadline)

    async def drain(self, grace_s: float) -> None:
        """End what would not end by itself within `grace_s` seconds; for a room without streams there is no such thing."""
        if isinstance(self._room, Drains):
            await self._room.drain(grace_s)


def parse(message: type[Parsed], payload: bytes) -> Parsed:
    """The message. Raises InvalidRequest that names the broken field."""
    try:
        return message.FromString(payload)
    except DecodeError:
        field = broken_field(message, payload)
        raise InvalidRequest(field, "malformed bytes", f"an encoded {message.DESCRIPTOR.full_name}") from None


def _snake_case(name: str) -> str:
    """SubmitJob -> submit_job."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
