"""A greedy batcher: take all that waits whenever the device is free, wait for nobody.

Knows items and one function over a list of them; does not know what they are. The function runs in a thread of its own,
one batch at a time, so the event loop stays free and the device is never shared. Work whose caller has left, or whose time has
passed, is never begun.
"""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from sdxs.errors import DeadlineExceeded, Overloaded
from services.fabric.deadline import Deadline
from services.fabric.fairness import Line

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batched(Generic[Result]):
    """One item's result, the size of the batch it was computed in, and its seconds in the queue and on the device."""

    result: Result
    batch: int
    queue_s: float = 0.0
    compute_s: float = 0.0


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    alone: bool
    deadline: Deadline
    done: "asyncio.Future[Batched[Result]]"
    since: float


def _one_bucket(_: object) -> Hashable:
    return None


class GreedyBatcher(Generic[Item, Result]):
    """Batches items by class, tenant and arrival (services.fabric.fairness); one that asks to be alone gets a batch of its own.

    Args:
        bucket: items of one bucket can be computed together, such as those of one shape. Whoever is next begins a batch, and those of
            its bucket fill it, in their order, past others that wait; these lose nothing but that the batch is fuller.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        max_batch: int,
        max_waiting: int,
        bucket: Callable[[Item], Hashable] = _one_bucket,
    ) -> None:
        self._compute = compute
        self._bucket = bucket
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: Line[_Waiting[Item, Result]] = Line()
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._running: asyncio.Task[None] | None = None

    async def submit(
        self, items: Sequence[Item], alone: bool = False, deadline: Deadline | None = None
    ) -> list[Batched[Result]]:
        """Results in the order of the items. Raises Overloaded when they do not fit the queue, DeadlineExceeded when the deadline passes
        before they begin, and what `compute` raises.

        Cancelling the caller withdraws the items that have not begun.
        """
        deadline = deadline or Deadline()
        if len(self._waiting) + len(items) > self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} items wait already, at most {self._max_waiting} may")
        loop = asyncio.get_running_loop()
        mine = [_Waiting[Item, Result](item, alone, deadline, loop.create_future(), time.monotonic()) for item in items]
        for waiting in mine:
            self._waiting.push(waiting, deadline.priority, deadline.tenant)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._drain())
        return list(await asyncio.gather(*(waiting.done for waiting in mine)))

    async def between(self, function: Callable[[], None]) -> None:
        """Run a function in the device's thread: after the batch in hand, before the next. Raises what it raises."""
        await asyncio.get_running_loop().run_in_executor(self._device, function)

    def close(self) -> None:
        """Let the thread end after the batch in hand."""
        self._device.shutdown(wait=False, cancel_futures=True)

    async def _drain(self) -> None:
        """Compute batch after batch until nothing waits."""
        loop = asyncio.get_running_loop()
        while batch := self._take():
            began = time.monotonic()
            try:
                results = await loop.run_in_executor(self._device, self._compute, [waiting.item for waiting in batch])
            except Exception as error:
                self._fail(batch, error)
            else:
                compute_s = time.monotonic() - began
                for waiting, result in zip(batch, results, strict=True):
                    if not waiting.done.done():
                        waiting.done.set_result(Batched(result, len(batch), began - waiting.since, compute_s))

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The next batch, without what nobody waits for any more."""
        batch: list[_Waiting[Item, Result]] = []
        while len(batch) < self._max_batch and (following := self._next(batch)) is not None:
            if following.done.done() or following.deadline.passed:
                self._fail([following], DeadlineExceeded("the deadline passed before the work began"))
            else:
                batch.append(following)
        return batch

    def _next(self, batch: "list[_Waiting[Item, Result]]") -> "_Waiting[Item, Result] | None":
        """Who is next, or the next that fits the batch."""
        if not batch:
            return self._waiting.pop() if self._waiting else None
        if batch[0].alone:
            return None
        bucket = self._bucket(batch[0].item)
        return self._waiting.pop_first(lambda waiting: not waiting.alone and self._bucket(waiting.item) == bucket)

    @staticmethod
    def _fail(batch: list[_Waiting[Item, Result]], error: Exception) -> None:
        """Hand the error to every caller that still listens."""
        for waiting in batch:
            if not waiting.done.done():
                waiting.done.set_exception(error)
