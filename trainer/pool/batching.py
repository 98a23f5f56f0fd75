"""A pool member's queue: greedy batching in front of one thread that owns the device.

Whenever the device is free it takes the request that has waited longest and every other that can share its forward, and waits for
nobody. Knows requests as `trainer.pool.joining` does; knows neither Ray nor the teacher's networks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from sdxs.errors import Overloaded
from trainer.pool.joining import Array, images, join, shareable, split

Reply = list[Array]
DELIVERY_S = 0.1  # what an announcement needs to leave the process


class Watcher(Protocol):
    """Is told what a batcher does, as it happens."""

    def queue(self, depth: int) -> None:
        """How many requests wait."""
        ...

    def forward(self, request: Any, requests: int, seconds: float) -> None:
        """A forward was computed: the joined request, of how many it was made, and how long it took."""
        ...


@dataclass
class Statistics:
    """Since the start: requests answered, their images, the forwards and seconds these took, requests refused and failed."""

    answered: int = 0
    images: int = 0
    forwards: int = 0
    busy_seconds: float = 0.0
    refused: int = 0
    failed: int = 0


@dataclass
class _Waiting:
    request: Any
    announce: Callable[[], object] | None
    future: Future[Reply] = field(default_factory=Future)


class Batcher:
    """Answers requests with `compute`, in a thread of its own, joining what can share a forward.

    Args:
        compute: request -> reply; called by one thread only.
        max_batch: images of a joined forward. A single request may be larger: its sender chose its size.
        max_queue: requests that may wait.
    """

    def __init__(self, compute: Callable[[Any], Reply], max_batch: int, max_queue: int, watcher: Watcher | None = None) -> None:
        self._compute, self._max_batch, self._max_queue, self._watcher = compute, max_batch, max_queue, watcher
        self._statistics, self._started = Statistics(), time.perf_counter()
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def submit(self, request: Any, announce: Callable[[], object] | None = None) -> Future[Reply]:
        """The reply to come. A request whose beginning is to be announced, a little before, shares its forward with no other.

        Raises:
            Overloaded: `max_queue` requests wait already.
        """
        with self._changed:
            if len(self._waiting) >= self._max_queue:
                self._statistics.refused += 1
                raise Overloaded(f"{len(self._waiting)} requests wait for this teacher already, at most {self._max_queue} may")
            waiting = _Waiting(request, announce)
            self._waiting.append(waiting)
            self._queue_changed()
        return waiting.future

    def statistics(self) -> dict[str, float]:
        """`Statistics`, and from them: queue depth, images a forward, seconds an image and a forward, the busy share of the time."""
        with self._changed:
            now, depth = asdict(self._statistics), len(self._waiting)
        forwards, done = max(1, now["forwards"]), max(1, now["images"])
        return now | {
            "queue_depth": depth,
            "batch_images": now["images"] / forwards,
            "seconds_per_image": now["busy_seconds"] / done,
            "seconds_per_forward": now["busy_seconds"] / forwards,
            "busy_share": now["busy_seconds"] / (time.perf_counter() - self._started),
        }

    def close(self) -> None:
        """Ends the thread after what it has in hand; what waits is cancelled."""
        with self._changed:
            self._closed = True
            for waiting in self._waiting:
                waiting.future.cancel()
            self._waiting.clear()
            self._changed.notify_all()

    def _queue_changed(self) -> None:
        self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.queue(len(self._waiting))

    def _run(self) -> None:
        while batch := self._take():
            if batch[0].announce is not None:
                batch[0].announce()
                time.sleep(DELIVERY_S)
            self._answer(batch)

    def _take(self) -> list[_Waiting]:
        """The longest waiting request and those that can join it, in order of arrival. Empty once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch = choose(self._waiting, self._max_batch)
            chosen = {id(waiting) for waiting in batch}
            self._waiting = deque(waiting for waiting in self._waiting if id(waiting) not in chosen)
            self._queue_changed()
        return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        """One forward for all; if it fails, one for each, so that an error reaches only the request that causes it."""
        batch = [waiting for waiting in batch if waiting.future.running() or waiting.future.set_running_or_notify_cancel()]
        if not batch:
            return
        try:
            replies = self._forward([waiting.request for waiting in batch])
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    self._answer([waiting])
                return
            self._count(failed=1)
            batch[0].future.set_exception(error)
            return
        for waiting, reply in zip(batch, replies, strict=True):
            waiting.future.set_result(reply)

    def _forward(self, requests: list[Any]) -> list[Reply]:
        joined, start = join(requests), time.perf_counter()
        replies = split(self._compute(joined), [images(request) for request in requests])
        seconds = time.perf_counter() - start
        self._count(answered=len(requests), images=images(joined), forwards=1, busy_seconds=seconds)
        if self._watcher is not None:
            self._watcher.forward(joined, len(requests), seconds)
        return replies

    def _count(self, **more: float) -> None:
        with self._changed:
            for name, value in more.items():
                setattr(self._statistics, name, getattr(self._statistics, name) + value)


def choose(waiting: deque[_Waiting], max_batch: int) -> list[_Waiting]:
    """The first request, and of the others, in order, each that can share its forward and still fits."""
    if not waiting:
        return []
    first, *others = waiting
    batch, left = [first], max_batch - images(first.request)
    if first.announce is not None:
        return batch
    kind = shareable(first.request)
    for other in others:
        if other.announce is None and images(other.request) <= left and shareable(other.request) == kind:
            batch.append(other)
            left -= images(other.request)
    return batch
