"""A teacher of the pool that is quick to start: no torch, no network. For tests that kill it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Ask:
    """Ask for twice the rows, after so many seconds; a `deadly` one kills who computes it, a `wrong` one is an error."""

    rows_BD: Array
    seconds: float = 0.0
    deadly: bool = False
    wrong: bool = False


class Doubler:
    """What `trainer.pool.member.members` is given as `load`."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, request: Ask) -> list[Array]:
        time.sleep(request.seconds)
        if request.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.wrong:
            raise ValueError("wrong")
        return [2 * request.rows_BD]


class Asker:
    """A client in a process of its own, which asks and never collects."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def ask(self, requests: list[Ask]) -> int:
        self.pending = [self.client.submit(request) for request in requests]
        return os.getpid()


class Crowd:
    """A client of so many members that nobody else asks. Answers when a reply is wanted, and counts what is unanswered at once."""

    def __init__(self, members: int, answer: Callable[[Any], list[Array]]) -> None:
        self.members, self.answer = [None] * members, answer
        self.asked: list[Any] = []
        self.waiting = self.most = 0

    def submit(self, request: Any) -> _Wanted:
        self.asked.append(request)
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        return _Wanted(self, request)


@dataclass
class _Wanted:
    crowd: Crowd
    request: Any

    def result(self) -> list[Array]:
        self.crowd.waiting -= 1
        return self.crowd.answer(self.request)
