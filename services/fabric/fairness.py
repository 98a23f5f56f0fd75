"""Who is next: weighted sharing between classes of urgency, equal sharing between the tenants inside a class.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): an item's start tag is the virtual time at which its flow would begin it if
each flow had its share of the device to itself; the smallest tag is next. A flow that has asked for little goes first, one that floods
waits for its share, and none starves.
"""

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

from services.fabric.deadline import Priority

Item = TypeVar("Item")

WEIGHTS = {Priority.HIGH: 16.0, Priority.NORMAL: 4.0, Priority.LOW: 1.0}
"""Shares of the device while all classes wait."""


class FairQueue(Generic[Item]):
    """Items of flows; all flows of a weight get the same share."""

    def __init__(self) -> None:
        self._items: list[tuple[float, int, Item]] = []  # by start tag; those of a flow in their order
        self._finish: dict[Hashable, float] = {}
        self._now = 0.0
        self._number = itertools.count()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: Item, flow: Hashable, weight: float = 1.0) -> None:
        """At the end of its flow."""
        start = max(self._now, self._finish.get(flow, 0.0))
        self._finish[flow] = start + 1.0 / weight
        heapq.heappush(self._items, (start, next(self._number), item))

    def peek(self) -> Item:
        """The next item. Raises IndexError when there is none."""
        return self._items[0][2]

    def pop(self) -> Item:
        """The next item, taken out. Raises IndexError when there is none."""
        self._now, _, item = heapq.heappop(self._items)
        if not self._items:  # a new busy period: nobody has had more than its share of it
            self._finish.clear()
        return item


class Line(Generic[Item]):
    """The two levels: classes by WEIGHTS, tenants inside each."""

    def __init__(self) -> None:
        self._turns: FairQueue[Priority] = FairQueue()
        self._items: dict[Priority, FairQueue[Item]] = {priority: FairQueue() for priority in WEIGHTS}

    def __len__(self) -> int:
        return len(self._turns)

    def push(self, item: Item, priority: Priority, tenant: str) -> None:
        """Behind those of the same tenant and class."""
        self._turns.push(priority, priority, WEIGHTS[priority])
        self._items[priority].push(item, tenant)

    def peek(self) -> Item:
        """The next item. Raises IndexError when there is none."""
        return self._items[self._turns.peek()].peek()

    def pop(self) -> Item:
        """The next item, taken out. Raises IndexError when there is none."""
        return self._items[self._turns.pop()].pop()
