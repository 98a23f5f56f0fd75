"""Who is next: weighted sharing between classes of urgency, equal sharing between the tenants inside a class.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): an item's start tag is the virtual time at which its flow would begin it if
each flow had its share of the device to itself; the smallest tag is next. A flow that has asked for little goes first, one that floods
waits for its share, and none starves.
"""

import functools
import heapq
import itertools
import operator
from collections.abc import Callable, Hashable
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

    def in_order(self) -> list[Item]:
        """Each once, by its first turn. For items that can be keys."""
        return list(dict.fromkeys(item for _, _, item in sorted(self._items, key=lambda entry: entry[:2])))

    def pop(self) -> Item:
        """The next item, taken out. Raises IndexError when there is none."""
        self._now, _, item = heapq.heappop(self._items)
        self._rest()
        return item

    def pop_first(self, wanted: Callable[[Item], bool]) -> Item | None:
        """The first item that is wanted, taken out before its turn; its flow has paid for it. None when there is none."""
        if self._items and wanted(self.peek()):
            return self.pop()
        found = min((entry for entry in self._items if wanted(entry[2])), default=None, key=lambda entry: entry[:2])
        if found is None:
            return None
        self._items.remove(found)
        heapq.heapify(self._items)
        self._rest()
        return found[2]

    def _rest(self) -> None:
        """A new busy period begins with the next item: nobody has had more than its share of it."""
        if not self._items:
            self._finish.clear()


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

    def pop_first(self, wanted: Callable[[Item], bool]) -> Item | None:
        """The first item that is wanted, taken out before its turn. None when there is none."""
        for priority in self._turns.in_order():
            found = self._items[priority].pop_first(wanted)
            if found is not None:
                self._turns.pop_first(functools.partial(operator.is_, priority))
                return found
        return None
