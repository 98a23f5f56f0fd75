"""What is to be told to one client, in order, as fast as it reads and no faster."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from sdxs.errors import Unavailable
from sdxs.v1 import stream_pb2

Send = Callable[[stream_pb2.StreamResponse], Awaitable[None]]

MAX_UNSENT = 256
"""Messages that wait for the client to read; then nothing more is read from it."""


class Outbox:
    """`run` sends what the other methods put in. A message of a frame waits only for the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._unsent: deque[tuple[stream_pb2.StreamResponse, asyncio.Event]] = deque()
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._sending_since = float("inf")
        self._gone = False

    def put(self, message: stream_pb2.StreamResponse) -> asyncio.Event:
        """Set when the message has been sent."""
        sent = asyncio.Event()
        if self._gone:
            sent.set()
            return sent
        self._unsent.append((message, sent))
        self._more.set()
        if len(self._unsent) >= MAX_UNSENT:
            self._room.clear()
        return sent

    async def room(self) -> None:
        """Return when the client has read enough for more to be said."""
        await self._room.wait()

    def check_read(self, limit_s: float) -> None:
        """Raises Unavailable when the client has not taken the message in hand for so many seconds."""
        if time.monotonic() - self._sending_since > limit_s:
            raise Unavailable(f"the client has read nothing for {limit_s:g} s")

    async def run(self) -> None:
        """Send for as long as the session lasts. Raises what the transport raises; nobody waits for messages then."""
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                while self._unsent:
                    await self._send_next()
        finally:
            self._gone = True
            for _, sent in self._unsent:
                sent.set()

    async def _send_next(self) -> None:
        """The oldest; it counts as unsent until the transport has taken it."""
        message, sent = self._unsent[0]
        self._sending_since = time.monotonic()
        await self._send(message)
        self._sending_since = float("inf")
        self._unsent.popleft()
        sent.set()
        if len(self._unsent) < MAX_UNSENT:
            self._room.set()
