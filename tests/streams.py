"""What the tests of streams share: messages in few words, and a client of a session without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from sdxs.v1 import control_pb2, stream_pb2
from services.gateway.stream import Sessions

OVERTAKEN, DEADLINE, SIMILAR, CLOSED = (
    stream_pb2.DROP_REASON_OVERTAKEN, stream_pb2.DROP_REASON_DEADLINE, stream_pb2.DROP_REASON_SIMILAR, stream_pb2.DROP_REASON_CLOSED,
)  # fmt: skip


def settings(**fields: Any) -> stream_pb2.StreamSettings:
    """With `controls` as a plain list."""
    if "controls" in fields:
        fields["controls"] = stream_pb2.StreamControls(controls=fields["controls"])
    return stream_pb2.StreamSettings(**fields)


def opening(model: str = "", resume_token: str = "", **fields: Any) -> stream_pb2.StreamRequest:
    """A prompt and a seed unless others are given."""
    look = settings(**fields) if resume_token else settings(**{"prompt": "red apple", "seed": 7, **fields})
    return stream_pb2.StreamRequest(open=stream_pb2.StreamOpen(model=model, resume_token=resume_token, settings=look))


def change(**fields: Any) -> stream_pb2.StreamRequest:
    return stream_pb2.StreamRequest(settings=settings(**fields))


def frame(frame_id: int, timeout: float | None = None, **fields: Any) -> stream_pb2.StreamRequest:
    message = stream_pb2.StreamFrame(id=frame_id, **fields)
    if timeout is not None:
        message.timeout.FromNanoseconds(round(timeout * 1e9))
    return stream_pb2.StreamRequest(frame=message)


def control(image: bytes, type_: str = "edge") -> control_pb2.Control:
    return control_pb2.Control(image=image, type=type_)


GOODBYE = stream_pb2.StreamRequest(close=stream_pb2.StreamClose())


def said(response: stream_pb2.StreamResponse) -> tuple[Any, ...]:
    """A response in short: ("image", id), ("dropped", id, reason), ("error", id, code, field), or (phase, position or reason)."""
    kind = response.WhichOneof("kind")
    if kind == "image":
        return "image", response.image.frame_id
    if kind == "dropped":
        return "dropped", response.dropped.frame_id, response.dropped.reason
    if kind == "error":
        return "error", response.error.frame_id, response.error.error.code, response.error.error.field
    state = response.state
    return stream_pb2.SessionPhase.Name(state.phase).removeprefix("SESSION_PHASE_"), state.position or state.reason


class Caller:
    """A client of `sessions` in the same loop. It reads all it is sent, unless `reads` is cleared."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._said: asyncio.Queue[stream_pb2.StreamRequest | None] = asyncio.Queue()
        self.heard: list[stream_pb2.StreamResponse] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.call = asyncio.create_task(sessions.run(self._requests(), self._hear))

    async def say(self, *requests: stream_pb2.StreamRequest) -> None:
        for request in requests:
            self._said.put_nowait(request)
            await settle()

    @property
    def unread(self) -> int:
        """Requests the session has not taken yet."""
        return self._said.qsize()

    @property
    def answers(self) -> list[tuple[Any, ...]]:
        """All it was told, in short, but for changes of the state."""
        return [said(one) for one in self.heard if not one.HasField("state")]

    @property
    def states(self) -> list[tuple[Any, ...]]:
        return [said(one) for one in self.heard if one.HasField("state")]

    @property
    def token(self) -> str:
        """The newest."""
        return [one.state.resume_token for one in self.heard if one.HasField("state")][-1]

    async def hang_up(self) -> None:
        self.call.cancel()
        await asyncio.gather(self.call, return_exceptions=True)

    async def _requests(self) -> AsyncIterator[stream_pb2.StreamRequest]:
        while (request := await self._said.get()) is not None:
            yield request

    async def _hear(self, response: stream_pb2.StreamResponse) -> None:
        await self.reads.wait()
        self.heard.append(response)


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Return when it holds. Raises TimeoutError when it does not within so many seconds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - tells of nothing by itself
            await asyncio.sleep(0.005)
