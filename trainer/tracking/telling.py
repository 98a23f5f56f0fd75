"""A sink that may be away. What it could not be told is told later, in order: who watches a run must not stop it, nor lose it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from trainer.tracking.sinks import Sink

LOG = logging.getLogger(__name__)
PAUSE_S = 15.0  # after a failure the sink is left alone
TRIES = 20  # then it is the call, not the sink: it is dropped
Tell = Callable[[Sink], None]


class Telling:
    """Calls of one sink. None raises; the first failure is logged, and so is what was never told."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.name = sink, type(sink).__name__
        self.owed: deque[Tell] = deque()
        self.dropped, self._tries, self._again, self._warned = 0, 0, 0.0, False

    def __call__(self, tell: Tell) -> None:
        """Tell it what it is owed, and this; nothing while it is left alone."""
        self.owed.append(tell)
        if time.monotonic() >= self._again:
            self._settle()

    def finish(self, tell: Tell) -> None:
        """The last one, now."""
        self.owed.append(tell)
        self._settle()
        if self.owed or self.dropped:
            LOG.warning("%s was not told %d notes of this run", self.name, len(self.owed) + self.dropped)

    def _settle(self) -> None:
        while self.owed:
            try:
                self.owed[0](self.sink)
            except Exception as error:
                self._failed(error)
                return
            self.owed.popleft()
            self._tries = 0

    def _failed(self, error: Exception) -> None:
        self._again, self._tries = time.monotonic() + PAUSE_S, self._tries + 1
        if not self._warned:
            LOG.warning("%s cannot be told; the run goes on, and it is tried again", self.name, exc_info=error)
            self._warned = True
        if self._tries >= TRIES:
            self.owed.popleft()
            self.dropped, self._tries = self.dropped + 1, 0
