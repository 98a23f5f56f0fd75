"""A teacher of the pool that is quick to start: no torch, no network. For tests that kill it."""

from __future__ import annotations

import os
import signal
import time
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
