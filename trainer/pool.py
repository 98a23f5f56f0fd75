"""The teacher pool: separate Ray actors, each with its own copy of the teacher, answering a training run's requests.

Requests go to the member with the fewest outstanding; the caller keeps several in flight, so that its own work hides the round trip.
Importing this module loads no model library: Ray's own processes unpickle the client, and each would pay for it.
A member that dies is restarted by Ray and its unanswered requests are retried: they are pure functions of their payload.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from trainer.teacher import Array, Pending, Request

RETRIES = 5


@ray.remote
class TeacherMember:
    """One actor of the pool."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch

        from trainer.teacher import Teacher

        torch.set_num_threads(threads)
        self.teacher = Teacher(Path(folder))
        self.answered, self.busy_seconds = 0, 0.0

    def answer(self, request: Request) -> list[Array]:
        """Compute one request."""
        start = time.perf_counter()
        reply = self.teacher.answer(request)
        self.answered, self.busy_seconds = self.answered + 1, self.busy_seconds + time.perf_counter() - start
        return reply

    def statistics(self) -> dict[str, float]:
        """Requests answered since the member's last start, and the seconds they took."""
        import os

        return {"pid": os.getpid(), "answered": self.answered, "busy_seconds": self.busy_seconds}


@dataclass
class _InFlight:
    reference: Any
    client: PoolClient
    member: int

    def result(self) -> list[Array]:
        reply: list[Array] = ray.get(self.reference)
        self.client.outstanding[self.member] -= 1
        return reply


@dataclass
class PoolClient:
    """A worker's view of the pool; holds actor handles only, so it can be sent to Ray Train workers."""

    members: list[Any]
    outstanding: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outstanding = [0] * len(self.members)

    def submit(self, request: Request) -> Pending:
        """Send to the least loaded member."""
        member = min(range(len(self.members)), key=self.outstanding.__getitem__)
        self.outstanding[member] += 1
        return _InFlight(self.members[member].answer.remote(request), self, member)


class TeacherPool:
    """Owns the actors."""

    def __init__(self, folder: Path, size: int, *, cpus: float = 1.0, threads: int = 1) -> None:
        options = {"num_cpus": cpus, "max_restarts": -1, "max_task_retries": RETRIES}
        member: Any = TeacherMember  # ray's decorator hides the actor's interface from type checkers
        self.members = [member.options(**options).remote(str(folder), threads) for _ in range(size)]

    def client(self) -> PoolClient:
        """A client for this process or for sending to a worker."""
        return PoolClient(list(self.members))

    def statistics(self) -> list[dict[str, float]]:
        """Per member: process id, requests answered, busy seconds."""
        result: list[dict[str, float]] = ray.get([member.statistics.remote() for member in self.members])
        return result

    def close(self) -> None:
        for member in self.members:
            ray.kill(member)
