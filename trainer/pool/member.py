"""One actor of the teacher pool: a teacher on its device, behind a batcher that all workers share.

Model libraries are imported by the actor alone: whoever only holds a handle to it never pays for them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

from trainer.pool.batching import Batcher, Reply, Watcher

if TYPE_CHECKING:
    from trainer.pool.client import Limits
    from trainer.specs import TeacherSpec

Answer = Callable[[Any], Reply]


def load_teacher(spec: TeacherSpec, threads: int, environment: dict[str, str], device: str) -> Answer:
    """A teacher's `answer`, computing with so many threads on a device. `environment` says where things are, also on another machine."""
    import torch

    os.environ.update(environment)
    from trainer.sources import hush
    from trainer.teacher import Teacher

    hush()
    teacher = Teacher.load(spec, device)

    def answer(request: Any) -> Reply:
        torch.set_num_threads(threads)  # of the calling thread, which is not this one
        return teacher.answer(request)

    return answer


@ray.remote
class TeacherMember:
    """Answers requests as they come, several of different workers in one forward; computes in a single thread."""

    def __init__(self, load: Callable[[str], Answer], limits: Limits) -> None:
        self.batcher = Batcher(load(device()), limits.max_batch, limits.max_queue, _watcher())
        self.turns: dict[str, asyncio.Event] = {}

    async def answer(self, request: Any, suspect: str = "") -> Reply:
        """Compute one request. One that may be what kills members has a name as `suspect`: it is computed alone, after `begins` tells.

        Raises:
            Overloaded: too many wait already.
        """
        if not suspect:
            return await asyncio.wrap_future(self.batcher.submit(request))
        loop, turn = asyncio.get_running_loop(), self.turns.setdefault(suspect, asyncio.Event())
        try:
            return await asyncio.wrap_future(self.batcher.submit(request, lambda: loop.call_soon_threadsafe(turn.set)))
        finally:
            turn.set()

    async def begins(self, suspect: str) -> None:
        """Returns when a suspect is about to be computed."""
        await self.turns.setdefault(suspect, asyncio.Event()).wait()
        del self.turns[suspect]

    async def statistics(self) -> dict[str, float]:
        """Of the batcher since the member's last start (`Batcher.statistics`), and its process id."""
        return {"pid": os.getpid()} | self.batcher.statistics()


def device() -> str:
    """Where a member computes: on its GPU if Ray gave it one or a part of one, which is then the only one it sees."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


def _watcher() -> Watcher | None:
    """Prometheus metrics through Ray, unless this cluster collects none."""
    if os.environ.get("RAY_enable_metrics_collection", "1") in ("0", "false"):  # noqa: SIM112 - Ray's own spelling
        return None
    from trainer.pool.metrics import PoolMetrics

    return PoolMetrics()


def members(load: Callable[[str], Answer], size: int, limits: Limits, **options: Any) -> list[Any]:
    """Starts `size` actors, each with the `Answer` that `load` makes for its device. Ray starts one that dies again, however often.

    Args:
        options: Ray's, of each actor (num_cpus, num_gpus).
    """
    actor: Any = TeacherMember  # ray's decorator hides the actor's interface from type checkers
    options = {"max_restarts": -1, "max_task_retries": -1, **options}
    return [actor.options(**options).remote(load, limits) for _ in range(size)]
