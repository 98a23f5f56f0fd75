"""All real-time sessions of a gateway: who is served, who waits, and how they end. One session: services.gateway.session."""

import asyncio
import secrets
import time

from sdxs.conversation import merged
from sdxs.errors import DeadlineExceeded, InvalidRequest, Overloaded, SdxsError, Unavailable
from sdxs.v1 import stream_pb2
from services.fabric.deadline import Deadline
from services.gateway.counts import Counts
from services.gateway.frames import Reader, Tokens, prefixed
from services.gateway.outbox import Send
from services.gateway.session import Opened, Requests, Session, Shared
from services.gateway.table import ModelTable
from services.settings import ServingSettings

_OPEN_WITHIN_S = 10.0


class Sessions:
    """All sessions of a gateway: at most `stream_max_sessions` are served, `stream_max_queued` wait for their turn."""

    def __init__(self, models: ModelTable, settings: ServingSettings) -> None:
        secret = settings.stream_secret.get_secret_value().encode() or secrets.token_bytes(32)
        self._shared = Shared(settings, Tokens(secret, settings.stream_token_s))
        self._settings = settings
        self._models = models
        self._connected = 0
        self._active: list[Session] = []
        self._queue: list[Session] = []
        self._draining = False

    @property
    def held(self) -> int:
        """Frames of all sessions that wait, are drawn, or are not yet sent."""
        return sum(session.held for session in [*self._active, *self._queue])

    @property
    def counts(self) -> Counts:
        """Since the start."""
        return self._shared.counts

    @property
    def active(self) -> int:
        """Sessions that are served."""
        return len(self._active)

    @property
    def queued(self) -> int:
        """Sessions that wait."""
        return len(self._queue)

    async def run(self, requests: Requests, send: Send, terms: Deadline | None = None) -> None:
        """One session, from its first message to its last; `terms` say in which class and for whom. Raises SdxsError, and what `send`
        raises."""
        self._admit_connection()
        session: Session | None = None
        try:
            session = await self._opened(await _opening(requests), send, terms or Deadline())
            self._enter(session)
            await session.serve(requests)
        finally:
            self._connected -= 1
            if session is not None:
                self._leave(session)

    async def drain(self, grace_s: float) -> None:
        """Let no session in, tell those there are, and give the frames that are computing four fifths of `grace_s` seconds."""
        self._draining = True
        for session in [*self._active, *self._queue]:
            session.drain()
        ends = time.monotonic() + grace_s
        await self._gone(0.8 * grace_s)
        for session in [*self._active, *self._queue]:
            session.abandon()
        await self._gone(ends - time.monotonic())

    async def _gone(self, seconds: float) -> None:
        """Return when all sessions have ended, or so many seconds have passed."""
        ends = time.monotonic() + seconds
        while self._connected and time.monotonic() < ends:  # noqa: ASYNC110 - rare, and over soon
            await asyncio.sleep(0.01)

    def _admit_connection(self) -> None:
        """Those that have not said what they want count too. Raises Unavailable or Overloaded."""
        if self._draining:
            raise Unavailable("the server stops")
        if self._connected >= self._settings.stream_max_sessions + self._settings.stream_max_queued:
            self.counts.refused += 1
            raise Overloaded(f"{self.active} sessions are served and {self.queued} wait already")
        self._connected += 1
        self.counts.sessions += 1

    async def _opened(self, asked: stream_pb2.StreamOpen, send: Send, terms: Deadline) -> Session:
        """A new session, or one that goes on. Raises InvalidRequest, NotFound, or Unavailable for a model that starts."""
        opened, last_answered = asked, 0
        try:
            if asked.resume_token:
                before, last_answered = self._shared.tokens.read(asked.resume_token)
                settings = merged(before.settings, asked.settings)
                opened = stream_pb2.StreamOpen(model=asked.model or before.model, settings=settings)
        except InvalidRequest as error:
            raise prefixed(error, "open.") from None
        if not opened.settings.HasField("seed"):
            opened.settings.seed = secrets.randbelow(2**32)
        reader = Reader(opened.model, self._models, self._settings.default_deadline_s, terms)
        try:
            settings = await reader.settled(opened.settings)
            reader.check(settings)
        except SdxsError as error:
            raise prefixed(error, "open." if error.field == "model" else "open.settings.") from None
        return Session(Opened(settings, last_answered, reader), send, self._shared)

    def _enter(self, session: Session) -> None:
        """Into a free place, or the queue. Raises Unavailable or Overloaded: others may have come while it said what it wants."""
        if self._draining:
            raise Unavailable("the server stops")
        if len(self._active) < self._settings.stream_max_sessions:
            self._active.append(session)
            session.admit()
        else:
            self._queue.append(session)
            session.tell_position(len(self._queue))

    def _leave(self, session: Session) -> None:
        """Make room for the next in the queue; all behind it move up."""
        if session in self._queue:
            gone = self._queue.index(session)
            self._queue.remove(session)
        elif session in self._active:
            gone = 0
            self._active.remove(session)
            if not self._queue or self._draining:
                return
            self._active.append(self._queue.pop(0))
            self._active[-1].admit()
        else:
            return
        for i, waiting in enumerate(self._queue[gone:], gone + 1):
            waiting.tell_position(i)


async def _opening(requests: Requests) -> stream_pb2.StreamOpen:
    """The first message. Raises InvalidRequest when it is another, DeadlineExceeded when none comes."""
    try:
        async with asyncio.timeout(_OPEN_WITHIN_S):
            first = await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceeded(f"no `open` within {_OPEN_WITHIN_S:g} s") from None
    if first is None or first.WhichOneof("kind") != "open":
        raise InvalidRequest("open", first and first.WhichOneof("kind"), "`open` as the first message")
    return first.open
