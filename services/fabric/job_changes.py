"""Hears which jobs have changed: one subscription to the channels of all jobs for as long as anybody listens.

A change is a hint to look, never the news itself: what is missed while Redis is away costs listeners the time to their next look.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from redis.exceptions import RedisError

from services.fabric.jobs import JobQueue

logger = logging.getLogger(__name__)


class JobChanges:
    """Make it and use it inside one event loop. Every gateway with a listener gets a few bytes for each change of any job."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._events: dict[bytes, set[asyncio.Event]] = {}
        self._listening: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change of the job, and when changes may have been missed."""
        channel, event = self._queue.key(job_id).encode(), asyncio.Event()
        self._events.setdefault(channel, set()).add(event)
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        try:
            yield event
        finally:
            self._events[channel].discard(event)
            if not self._events[channel]:
                del self._events[channel]
            if not self._events:
                self._listening.cancel()
                self._listening = None

    def wake(self) -> None:
        """Have every listener look."""
        for events in self._events.values():
            for event in events:
                event.set()

    async def _listen(self) -> None:
        """Until nobody listens any more."""
        while True:
            try:
                async with self._queue.redis.pubsub() as pubsub:
                    await pubsub.psubscribe(self._queue.key("*"))
                    async for message in pubsub.listen():
                        self._tell(message)
            except RedisError as error:
                logger.warning("no changes of jobs are heard: %s", error)
                await asyncio.sleep(1.0)

    def _tell(self, message: dict[str, Any]) -> None:
        """A change of one job; the answer to a subscription, a later one after a broken connection too, means all."""
        if message["type"] == "psubscribe":
            self.wake()
        for event in self._events.get(message["channel"], ()):
            event.set()
