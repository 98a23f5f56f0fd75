"""One real-time session: frames in, images out, the latest wins. Knows the chain and the messages; knows no gRPC and no WebSocket.

A session holds one frame that waits, one that is on its way through the U-Net, and at most `stream_in_flight` between there and the client.
A frame that comes takes the place of the one that waits, so what the U-Net draws next is the newest there is, however many were sent.
All of it runs in one event loop, and every change of state is a plain function there: nothing needs a lock.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

from sdxs.conversation import merged
from sdxs.errors import InvalidRequest, SdxsError
from sdxs.v1 import stream_pb2
from services.gateway.counts import Counts
from services.gateway.frames import Frame, Reader, Tokens, prefixed
from services.gateway.outbox import Outbox, Send
from services.gateway.painter import Painter, dropped, failed
from services.gateway.similarity import SimilarityFilter
from services.settings import ServingSettings

Requests = AsyncIterator[stream_pb2.StreamRequest]

_LAST_WORDS_S = 5.0  # for a client to read what was said before the end


@dataclass(frozen=True)
class Shared:
    """What the sessions of a gateway have in common."""

    settings: ServingSettings
    tokens: Tokens
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True)
class Opened:
    """What a client asked for, checked."""

    look: stream_pb2.StreamSettings
    last_answered: int
    """Frame of the session that goes on in this one; 0: none."""
    reader: Reader


class Session:
    """One client's frames. `Sessions` makes it, admits it, and drains it; `serve` runs it."""

    def __init__(self, opened: Opened, send: Send, shared: Shared) -> None:
        settings = shared.settings
        self.id = secrets.token_hex(8)
        self.phase: stream_pb2.SessionPhase = stream_pb2.SESSION_PHASE_QUEUED
        self._position = 0
        self._look = opened.look
        self._settings_taken = 0
        self._last_answered = self._last_id = opened.last_answered
        self._reader = opened.reader
        similarity = SimilarityFilter(settings.stream_similarity, settings.stream_max_skips)
        self._painter = Painter(opened.reader.models, similarity)
        self._shared = shared
        self._outbox = Outbox(send)
        self._most = settings.stream_in_flight
        self._idle_s = settings.stream_idle_s
        self._pending: Frame | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._at_unet: Frame | None = None
        self._computing: dict[int, asyncio.Task[None]] = {}
        self._in_flight = 0
        self._still = asyncio.Event()
        self._ended: asyncio.Future[stream_pb2.ClosedReason] = asyncio.get_running_loop().create_future()
        self._heard = time.monotonic()

    @property
    def held(self) -> int:
        """Frames that wait, are drawn, or are not yet sent."""
        return self._in_flight + (self._pending is not None)

    async def serve(self, requests: Requests) -> None:
        """Until the client closes, the server drains, or something is wrong: raises SdxsError, and what `send` raises."""
        running = [
            asyncio.create_task(self._until_it_ends(part)) for part in (self._read(requests), self._outbox.run(), self._watch())
        ]
        self._pump()
        try:
            reason = await self._ended
            await self._finish(reason)
        finally:
            self._forget_pending()
            everything = [*running, *self._computing.values()]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    def admit(self) -> None:
        """Begin to draw."""
        if self.phase != stream_pb2.SESSION_PHASE_QUEUED:
            return  # it is about to leave
        self.phase, self._position = stream_pb2.SESSION_PHASE_ACTIVE, 0
        self._heard = time.monotonic()
        self._tell_state()
        self._pump()

    def tell_position(self, position: int) -> None:
        """While it waits to be admitted."""
        if self.phase == stream_pb2.SESSION_PHASE_QUEUED:
            self._position = position
            self._tell_state()

    def drain(self) -> None:
        """Let the frames that are computing end, and then the session."""
        if self._ended.done():
            return
        self.phase, self._position = stream_pb2.SESSION_PHASE_DRAINING, 0
        self._tell_state()
        self._drop_pending(stream_pb2.DROP_REASON_CLOSED)
        self._pump()
        self._end(stream_pb2.CLOSED_REASON_DRAINED)

    def abandon(self) -> None:
        """End without the frames that are held."""
        self._drop_pending(stream_pb2.DROP_REASON_CLOSED)
        for frame_id, task in list(self._computing.items()):
            task.cancel()
            self._drop(frame_id, stream_pb2.DROP_REASON_CLOSED)
        self._computing.clear()
        self._pump()

    # What ends a session

    async def _until_it_ends(self, part: Coroutine[Any, Any, stream_pb2.ClosedReason | None]) -> None:
        """Run a part of the session; what it returns or raises ends the whole."""
        try:
            reason = await part
        except Exception as error:
            if not self._ended.done():
                self._ended.set_exception(error)
        else:
            if reason is not None:
                self._end(reason)

    def _end(self, reason: stream_pb2.ClosedReason) -> None:
        """The first one counts."""
        if not self._ended.done():
            self._ended.set_result(reason)

    async def _watch(self) -> stream_pb2.ClosedReason:
        """Return when the client has said nothing for too long. Raises Unavailable when it has read nothing."""
        while True:
            await asyncio.sleep(self._idle_s / 10)
            self._outbox.check_read(self._idle_s)
            silent = time.monotonic() - self._heard > self._idle_s
            if silent and self.phase == stream_pb2.SESSION_PHASE_ACTIVE and not self.held:
                return stream_pb2.CLOSED_REASON_IDLE

    async def _finish(self, reason: stream_pb2.ClosedReason) -> None:
        """Answer what is held, then say goodbye."""
        while not self._still.is_set():
            self._outbox.check_read(self._idle_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._idle_s / 10):
                    await self._still.wait()
        self.phase, self._position = stream_pb2.SESSION_PHASE_CLOSED, 0
        goodbye = self._tell_state(reason=reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await goodbye.wait()

    # What the client says

    async def _read(self, requests: Requests) -> stream_pb2.ClosedReason:
        """Return when the client has said all it wants."""
        async for request in requests:
            self._heard = time.monotonic()
            if request.WhichOneof("kind") == "close":
                break
            await self._take(request)
            await self._outbox.room()
        return stream_pb2.CLOSED_REASON_CLIENT

    async def _take(self, request: stream_pb2.StreamRequest) -> None:
        """One message. Raises InvalidRequest for one that makes no sense here."""
        kind = request.WhichOneof("kind")
        if kind == "frame":
            self._offer(request.frame)
        elif kind == "settings":
            await self._configure(request.settings)
        elif kind == "open":
            raise InvalidRequest("open", "a second one", "one, as the first message")
        else:
            raise InvalidRequest("kind", kind, "a frame, settings or close")

    async def _configure(self, changes: stream_pb2.StreamSettings) -> None:
        """For the frames to come; what cannot be drawn changes nothing."""
        wanted = merged(self._look, changes)
        try:
            wanted = await self._reader.settled(wanted)
            self._reader.check(wanted)
        except SdxsError as error:
            self._settings_taken += 1
            self._tell_error(0, prefixed(error, "settings."))
            return
        self._settings_taken += 1
        self._look = wanted
        self._tell_state()

    def _offer(self, message: stream_pb2.StreamFrame) -> None:
        """A frame takes the place of the one that waits. Raises InvalidRequest when its id does not grow: it could not be answered."""
        if message.id <= self._last_id:
            raise InvalidRequest("frame.id", message.id, f"more than {self._last_id}, the one before")
        self._last_id = message.id
        self._shared.counts.frames += 1
        if self._ended.done():
            self._drop(message.id, stream_pb2.DROP_REASON_CLOSED)
            return
        try:
            frame = self._reader.read(message, self._look)
        except SdxsError as error:
            self._tell_error(message.id, error)
            return
        self._drop_pending(stream_pb2.DROP_REASON_OVERTAKEN)
        self._pending = frame
        left = frame.deadline.at - time.monotonic()
        self._expiry = asyncio.get_running_loop().call_later(max(0.0, left), self._expire, frame)
        self._pump()

    # What becomes of a frame

    def _pump(self) -> None:
        """Take up the frame that waits, if its turn has come."""
        free = self.phase != stream_pb2.SESSION_PHASE_QUEUED and self._at_unet is None and self._in_flight < self._most
        frame = self._pending
        if frame is not None and free:
            self._forget_pending()
            if frame.deadline.passed:
                self._drop(frame.id, stream_pb2.DROP_REASON_DEADLINE)
            else:
                self._at_unet = frame
                self._in_flight += 1
                self._computing[frame.id] = task = asyncio.create_task(self._answer(frame))
                task.add_done_callback(lambda _: self._release(frame))  # also of one that is cancelled before it begins
        if self.held:
            self._still.clear()
        else:
            self._still.set()

    def _expire(self, frame: Frame) -> None:
        """Its time ran out before its turn came."""
        if self._pending is frame:
            self._drop_pending(stream_pb2.DROP_REASON_DEADLINE)
            self._pump()

    async def _answer(self, frame: Frame) -> None:
        """Draw the frame, and say what became of it unless a newer one was done before."""
        response = await self._painter.draw(frame, self._leave_unet)
        if self._computing.pop(frame.id, None) is None:
            return
        if not response.HasField("image"):
            self._tell(response)
            return
        self._overtake(frame.id)
        self._last_answered = frame.id
        self._painter.end(frame.id, answered=True)
        await self._tell(response).wait()

    def _release(self, frame: Frame) -> None:
        """Its place is free."""
        self._in_flight -= 1
        self._painter.end(frame.id, answered=False)
        self._leave_unet(frame)

    def _leave_unet(self, frame: Frame) -> None:
        """The next may go there."""
        if self._at_unet is frame:
            self._at_unet = None
        self._pump()

    def _overtake(self, frame_id: int) -> None:
        """Older frames that are still decoded would come too late."""
        for older in [each for each in self._computing if each < frame_id]:
            self._computing.pop(older).cancel()
            self._drop(older, stream_pb2.DROP_REASON_OVERTAKEN)

    def _drop_pending(self, reason: stream_pb2.DropReason) -> None:
        """The frame that waits will not be drawn."""
        frame = self._pending
        if frame is not None:
            self._forget_pending()
            self._drop(frame.id, reason)

    def _forget_pending(self) -> None:
        self._pending = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    # What the client is told

    def _drop(self, frame_id: int, reason: stream_pb2.DropReason) -> None:
        self._tell(dropped(frame_id, reason))

    def _tell_error(self, frame_id: int, error: SdxsError) -> None:
        self._tell(failed(frame_id, error))

    def _tell_state(self, reason: stream_pb2.ClosedReason | None = None) -> asyncio.Event:
        """Where the session stands, and how to take it up again. Says when it has been sent."""
        state = stream_pb2.SessionState(
            phase=self.phase,
            session_id=self.id,
            position=self._position,
            resume_token=self._shared.tokens.make(self._reader.model, self._look, self._last_answered),
            reason=reason,
            last_answered=self._last_answered,
            settings_taken=self._settings_taken,
        )
        return self._tell(stream_pb2.StreamResponse(state=state))

    def _tell(self, response: stream_pb2.StreamResponse) -> asyncio.Event:
        """Says when it has been sent."""
        self._shared.counts.note(response)
        return self._outbox.put(response)
