"""Images in real time: `Client.stream` and `AsyncClient.stream` of `sdxs.client`.

    with client.stream(prompt="red apple", seed=1) as stream:
        stream.send(controls=[Control(first, "sketch")])
        for event in stream:
            if isinstance(event, Drawn):
                event.image.save("apple.jpg")
                stream.send(controls=[Control(next_sketch(), "sketch")])

Send as often as you like: the server draws the newest frame, and says which it dropped. When the connection breaks or the server drains,
the stream goes on by itself on the next server: the newest frame that was not answered is sent again, older ones are `Dropped`.
"""

import asyncio
import contextlib
import functools
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from sdxs import rpc
from sdxs.conversation import Conversation, Drawn, Dropped, Event, Failed, FrameOptions, Look, Phase, settings_of
from sdxs.errors import Overloaded, SdxsError, Unavailable
from sdxs.v1 import stream_pb2

__all__ = ["AsyncStream", "Drawn", "Dropped", "Event", "Failed", "FrameOptions", "Look", "Phase", "Stream"]

METHOD = "/sdxs.v1.GatewayService/Stream"
_READ_AHEAD = 8  # events an asyncio consumer may be behind before nothing more is read


class _Attempts:
    """Whether and when to look for a server again."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.heard()

    def heard(self) -> None:
        """From a server."""
        self._since = time.monotonic()
        self._pause = 0.05

    def pause(self, conversation: Conversation, error: SdxsError) -> float:
        """Seconds to wait before the next attempt. Raises the error when there is to be none."""
        if conversation.resumes and error.field == "open.resume_token":
            conversation.forget_token()
            return 0.0
        waited = time.monotonic() - self._since
        if not isinstance(error, Unavailable | Overloaded) or waited > self._patience_s:
            raise error
        if isinstance(error, Overloaded) and not conversation.resumes:
            raise error
        self._pause = min(1.0, 2 * self._pause)
        return self._pause * random.uniform(0.5, 1.0)


class Stream:
    """A stream for threads: iterate in one, send from any. `Client.stream` makes it."""

    def __init__(self, channel: grpc.Channel, conversation: Conversation, patience_s: float, metadata: rpc.Terms = ()) -> None:
        self._method: Any = functools.partial(channel.stream_stream(METHOD), metadata=metadata)
        self._conversation = conversation
        self._attempts = _Attempts(patience_s)
        self._changed = threading.Condition()
        self._call: Any = None
        self._connection = 0

    def __enter__(self) -> Self:
        self._connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._conversation.closed = True
        self._hang_up()

    def send(self, **options: Unpack[FrameOptions]) -> int:
        """Send a frame; its id. Raises InvalidRequest, or PreconditionFailed after the end."""
        with self._changed:
            frame_id = self._conversation.send(options)
            self._changed.notify_all()
        return frame_id

    def configure(self, **look: Unpack[Look]) -> None:
        """Change what the frames from now on have in common; what is not named stays."""
        with self._changed:
            self._conversation.configure(settings_of(look))
            self._changed.notify_all()

    def finish(self) -> None:
        """No more frames: what was sent is answered, and then the iteration ends."""
        with self._changed:
            self._conversation.finish()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, until the session is closed. Raises SdxsError."""
        going = True
        while going:
            try:
                for payload in self._call:
                    self._attempts.heard()
                    with self._changed:
                        going = self._conversation.hear(stream_pb2.StreamResponse.FromString(payload))
                    yield from self._events()
                error: SdxsError = Unavailable("the server has ended the stream")
            except grpc.RpcError as found:
                error = rpc.from_rpc_error(found)
            if going:
                self._hang_up()
                time.sleep(self._attempts.pause(self._conversation, error))
                with self._changed:
                    self._conversation.lose()
                self._connect()
                yield from self._events()

    def _events(self) -> Iterator[Event]:
        """Those that wait."""
        while True:
            with self._changed:
                if not self._conversation.events:
                    return
                event = self._conversation.events.popleft()
            yield event

    def _connect(self) -> None:
        with self._changed:
            self._connection += 1
            self._call = self._method(self._requests(self._connection))

    def _requests(self, connection: int) -> Iterator[bytes]:
        """What is sent on one connection, for as long as it is the current one; runs in a thread of gRPC's."""
        with self._changed:
            first = self._conversation.opening()
        yield first.SerializeToString()
        while True:
            request = None
            with self._changed:
                while self._connection == connection and (request := self._conversation.next()) is None:
                    self._changed.wait()
            if request is None:
                return
            yield request.SerializeToString()

    def _hang_up(self) -> None:
        with self._changed:
            self._connection += 1
            self._changed.notify_all()
        self._call.cancel()


class AsyncStream:
    """The same for asyncio. `AsyncClient.stream` makes it."""

    def __init__(
        self, channel: grpc.aio.Channel, conversation: Conversation, patience_s: float, metadata: rpc.Terms = ()
    ) -> None:
        self._method: Any = functools.partial(channel.stream_stream(METHOD), metadata=metadata)
        self._conversation = conversation
        self._attempts = _Attempts(patience_s)
        self._more = asyncio.Event()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(_READ_AHEAD)
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._conversation.closed = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def send(self, **options: Unpack[FrameOptions]) -> int:
        """See Stream.send."""
        frame_id = self._conversation.send(options)
        self._more.set()
        return frame_id

    async def configure(self, **look: Unpack[Look]) -> None:
        """See Stream.configure."""
        self._conversation.configure(settings_of(look))
        self._more.set()

    async def finish(self) -> None:
        """See Stream.finish."""
        self._conversation.finish()
        self._more.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """See Stream.__iter__."""
        assert self._running is not None, "use `async with`"
        while (event := await self._events.get()) is not None:
            yield event
        await self._running

    async def _run(self) -> None:
        """Converse, then tell the consumer that nothing more will come."""
        try:
            await self._go_on()
        except Exception:
            await self._events.put(None)
            raise
        await self._events.put(None)

    async def _go_on(self) -> None:
        """One connection after the other, until the session is closed. Raises SdxsError."""
        while True:
            error: SdxsError = Unavailable("the server has ended the stream")
            try:
                if not await self._converse():
                    return
            except SdxsError as found:
                error = found
            await asyncio.sleep(self._attempts.pause(self._conversation, error))
            self._conversation.lose()
            await self._hand_over()

    async def _converse(self) -> bool:
        """One connection; whether the session goes on after it. Raises SdxsError."""
        call: Any = self._method()
        writing = asyncio.create_task(self._write(call))
        try:
            async for payload in call:
                self._attempts.heard()
                going = self._conversation.hear(stream_pb2.StreamResponse.FromString(payload))
                await self._hand_over()
                if not going:
                    return False
            return True
        except grpc.aio.AioRpcError as error:
            raise rpc.from_rpc_error(await _last_word(call, error)) from None
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            call.cancel()

    async def _write(self, call: Any) -> None:
        """What is sent on one connection. That it breaks is the reader's to see."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._conversation.opening().SerializeToString())
            while True:
                while (request := self._conversation.next()) is not None:
                    await call.write(request.SerializeToString())
                self._more.clear()
                await self._more.wait()

    async def _hand_over(self) -> None:
        """Give the consumer what waits, as fast as it takes it."""
        while self._conversation.events:
            await self._events.put(self._conversation.events.popleft())


async def _last_word(call: Any, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
    """The server's own status: when the call ends while a message is written, grpc.aio has one of its own until it reads that."""
    if error.details() != "Internal error from Core":
        return error
    for _ in range(50):
        if await call.details() != error.details():
            break
        await asyncio.sleep(0.02)
    metadata = await call.trailing_metadata()
    return grpc.aio.AioRpcError(await call.code(), error.initial_metadata(), metadata, await call.details())
