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
import collections
import contextlib
import functools
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc

from sdxs import rpc
from sdxs.client import Image, choice, fill, image_of
from sdxs.control import Control
from sdxs.errors import InvalidRequest, Overloaded, PreconditionFailed, SdxsError, Unavailable
from sdxs.v1 import control_pb2, decoder_pb2, stream_pb2

METHOD = "/sdxs.v1.GatewayService/Stream"
_READ_AHEAD = 8  # events an asyncio consumer may be behind before nothing more is read


class Look(TypedDict, total=False):
    """What frames have in common; see StreamSettings in stream.proto."""

    prompt: str
    seed: int
    format: str
    """jpeg (default), png, webp or raw."""
    deterministic: bool
    controls: Sequence[Control]
    """An empty list takes them away."""
    init_image: bytes
    """Empty bytes take it away."""
    strength: float


class FrameOptions(TypedDict, total=False):
    """What one frame has of its own; see StreamFrame in stream.proto."""

    prompt: str
    seed: int
    controls: Sequence[Control]
    init_image: bytes
    strength: float
    timeout: float
    """Seconds; a frame whose time runs out is dropped."""


@dataclass(frozen=True)
class Drawn:
    """A frame's image. Seconds are the server's, from the frame's arrival."""

    frame_id: int
    image: Image
    seed: int
    unet_batch: int
    queued_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Dropped:
    """A frame that was not drawn: overtaken, deadline, closed, or similar to the frame `standing_frame_id`, whose image still stands."""

    frame_id: int
    reason: str
    standing_frame_id: int = 0


@dataclass(frozen=True)
class Failed:
    """A frame that cannot be drawn; 0: settings that were refused, and changed nothing."""

    frame_id: int
    error: SdxsError


@dataclass(frozen=True)
class Phase:
    """Where the session stands: queued (1 is next), active, draining or closed (client, drained or idle)."""

    name: str
    position: int = 0
    reason: str = ""


Event = Drawn | Dropped | Failed | Phase


def merged(settings: stream_pb2.StreamSettings, changes: stream_pb2.StreamSettings) -> stream_pb2.StreamSettings:
    """What is set in `changes` in place of what is in `settings`."""
    found = stream_pb2.StreamSettings()
    found.CopyFrom(settings)
    if changes.HasField("controls"):
        found.ClearField("controls")  # protobuf would append to the list
    found.MergeFrom(changes)
    return found


def settings_of(look: Look) -> stream_pb2.StreamSettings:
    """The message. Raises InvalidRequest for a value the wire cannot carry."""
    message, fields = stream_pb2.StreamSettings(), dict(look)
    if "controls" in fields:
        message.controls.SetInParent()
        _add_controls(message.controls, fields.pop("controls"))
    if "format" in look:
        fields["format"] = choice("format", look["format"], decoder_pb2.ImageFormat, "IMAGE_FORMAT_")
    fill(message, fields)
    return message


def frame_of(frame_id: int, options: FrameOptions) -> stream_pb2.StreamFrame:
    """The message. Raises InvalidRequest for a value the wire cannot carry."""
    message, fields = stream_pb2.StreamFrame(id=frame_id), dict(options)
    _add_controls(message, fields.pop("controls", ()))
    if "timeout" in options:
        message.timeout.FromNanoseconds(round(1e9 * options["timeout"]))
        del fields["timeout"]
    fill(message, fields)
    return message


def _add_controls(message: Any, controls: Any) -> None:
    for i, control in enumerate(controls or ()):
        if not isinstance(control, Control):
            raise InvalidRequest(f"controls[{i}]", control, "an sdxs.control.Control")
        added: control_pb2.Control = message.controls.add()
        fill(added, asdict(control), f"controls[{i}].")


class Conversation:
    """What is said on a stream and what it means, over any number of connections. Does no input or output; not thread-safe."""

    def __init__(self, model: str, settings: stream_pb2.StreamSettings) -> None:
        self.closed = False
        """Said goodbye, or heard it."""
        self._model = model
        self._settings = settings
        """Those the server has taken; what it refuses is never said again."""
        self._unconfirmed: collections.deque[stream_pb2.StreamSettings] = collections.deque()
        self._taken = 0
        self._token = ""
        self._last_id = 0
        self._newest = stream_pb2.StreamFrame()
        self._unanswered: dict[int, None] = {}
        self._outgoing: collections.deque[stream_pb2.StreamRequest] = collections.deque()
        self._phase = Phase("")
        self.events: collections.deque[Event] = collections.deque()
        """To be taken by the consumer."""

    def opening(self) -> stream_pb2.StreamRequest:
        """The first message of a connection."""
        opened = stream_pb2.StreamOpen(model=self._model, settings=self._settings, resume_token=self._token)
        return stream_pb2.StreamRequest(open=opened)

    def configure(self, changes: stream_pb2.StreamSettings) -> None:
        """Change what the frames from now on have in common."""
        self._check_open()
        self._unconfirmed.append(changes)
        self._outgoing.append(stream_pb2.StreamRequest(settings=changes))

    def send(self, options: FrameOptions) -> int:
        """The id of the new frame. One that has not left yet is overtaken here."""
        self._check_open()
        frame = frame_of(self._last_id + 1, options)
        self._last_id = frame.id
        for waiting in [each for each in self._outgoing if each.HasField("frame")]:
            self._outgoing.remove(waiting)
            self._answered(Dropped(waiting.frame.id, "overtaken"))
        self._newest = frame
        self._unanswered[frame.id] = None
        self._outgoing.append(stream_pb2.StreamRequest(frame=frame))
        return frame.id

    def finish(self) -> None:
        """No more frames."""
        if not self.closed:
            self.closed = True
            self._outgoing.append(stream_pb2.StreamRequest(close=stream_pb2.StreamClose()))

    def next(self) -> stream_pb2.StreamRequest | None:
        """What is to be sent next, if anything is."""
        return self._outgoing.popleft() if self._outgoing else None

    def hear(self, response: stream_pb2.StreamResponse) -> bool:
        """Understand one message; False when the server will not say more, and the session is over."""
        kind = response.WhichOneof("kind")
        if kind == "state":
            return self._hear_state(response.state)
        if kind == "image":
            self._answered(_drawn(response.image))
        elif kind == "error":
            error = response.error.error
            if not response.error.frame_id:
                self._confirm(self._taken + 1, refused=True)
            self._answered(Failed(response.error.frame_id, rpc.from_words(error.code, error.message, error.field)))
        elif kind == "dropped":
            dropped = response.dropped
            lost = dropped.reason == stream_pb2.DROP_REASON_CLOSED and dropped.frame_id == self._newest.id
            if not lost:  # that one will be sent again
                reason = stream_pb2.DropReason.Name(dropped.reason).removeprefix("DROP_REASON_").lower()
                self._answered(Dropped(dropped.frame_id, reason, dropped.standing_frame_id))
        return True

    def lose(self) -> None:
        """The connection is gone: the newest frame will go out again on the next, those before it are lost, as they would be stale."""
        self._outgoing.clear()
        self._taken = 0
        self._outgoing.extend(stream_pb2.StreamRequest(settings=changes) for changes in self._unconfirmed)
        for frame_id in list(self._unanswered):
            if frame_id == self._newest.id:
                self._outgoing.append(stream_pb2.StreamRequest(frame=self._newest))
            else:
                self._answered(Dropped(frame_id, "closed"))
        if self.closed:
            self._outgoing.append(stream_pb2.StreamRequest(close=stream_pb2.StreamClose()))

    def forget_token(self) -> None:
        """The next server does not know it; the settings are known here too."""
        self._token = ""

    @property
    def resumes(self) -> bool:
        """Whether the next opening asks for the session before."""
        return bool(self._token)

    def _confirm(self, taken: int, refused: bool = False) -> None:
        """So many settings messages of this connection have been taken."""
        while self._taken < taken and self._unconfirmed:
            changes = self._unconfirmed.popleft()
            self._taken += 1
            if not refused:
                self._settings = merged(self._settings, changes)

    def _hear_state(self, state: stream_pb2.SessionState) -> bool:
        self._token = state.resume_token
        self._confirm(state.settings_taken)
        reason = stream_pb2.ClosedReason.Name(state.reason).removeprefix("CLOSED_REASON_").lower() if state.reason else ""
        phase = Phase(stream_pb2.SessionPhase.Name(state.phase).removeprefix("SESSION_PHASE_").lower(), state.position, reason)
        if state.reason == stream_pb2.CLOSED_REASON_DRAINED:
            return True  # nothing will come, and another server takes over
        if phase != self._phase:
            self._phase = phase
            self.events.append(phase)
        self.closed = self.closed or phase.name == "closed"
        return phase.name != "closed"

    def _answered(self, event: Drawn | Dropped | Failed) -> None:
        self._unanswered.pop(event.frame_id, None)
        self.events.append(event)

    def _check_open(self) -> None:
        if self.closed:
            raise PreconditionFailed("the stream is closed")


def _drawn(image: stream_pb2.FrameImage) -> Drawn:
    """Without protobuf."""
    return Drawn(image.frame_id, image_of(image.image), image.seed, image.unet_batch, image.queued_seconds, image.total_seconds)


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
