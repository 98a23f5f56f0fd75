"""The stream of the dead: jobs given up after `job_max_deliveries`, for people to look at and to replay."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

from sdxs.errors import NotFound, PreconditionFailed
from sdxs.v1 import gateway_pb2
from services.fabric import job_scripts as scripts
from services.fabric.jobs import JobQueue

_PAGE = 100


@dataclass(frozen=True)
class DeadJob:
    """One line of the stream."""

    entry: str
    job_id: str
    why: str

    @property
    def at(self) -> datetime:
        """When it died: entries of a stream begin with milliseconds since 1970."""
        return datetime.fromtimestamp(int(self.entry.partition("-")[0]) / 1000, UTC)


async def dead_jobs(queue: JobQueue, most: int | None = None) -> AsyncIterator[DeadJob]:
    """The last first, at most so many. Raises redis.RedisError."""
    highest, number = "+", 0
    while page := await queue.redis.xrevrange(f"{queue.prefix}:dead", max=highest, count=_PAGE):
        for entry, fields in page:
            if number == most:
                return
            number += 1
            yield DeadJob(*(text.decode(errors="replace") for text in (entry, fields[b"job"], fields[b"why"])))
        highest = f"({page[-1][0].decode()}"


async def find_dead(queue: JobQueue, job_id: str) -> DeadJob:
    """The last line about a job. Raises NotFound."""
    async for dead in dead_jobs(queue):
        if dead.job_id == job_id:
            return dead
    raise NotFound(f"no dead job {job_id!r}")


async def request_of(queue: JobQueue, job_id: str) -> gateway_pb2.SubmitJobRequest:
    """What the job asked for, as it was queued; empty when that is gone."""
    return gateway_pb2.SubmitJobRequest.FromString(await queue.redis.hget(queue.key(job_id), "request") or b"")


async def replay(queue: JobQueue, dead: DeadJob) -> None:
    """Queue it again under its id, with all its deliveries before it; a batch keeps its items.

    Raises PreconditionFailed when it was replayed already or is forgotten, Overloaded when the queue is full.
    """
    limits = (queue.settings.max_queued_jobs, queue.settings.max_queued_bytes)
    answer = await queue.run(scripts.REPLAY, dead.job_id, dead.entry, *limits)
    if answer == b"gone":
        raise PreconditionFailed(f"job {dead.job_id!r} is not dead any more: replayed before, or forgotten")
    queue.check_room(answer)
