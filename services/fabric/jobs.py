"""The job queue on Redis: one stream of ids, one consumer group, one hash per job.

At least once: an entry stays pending until its job has ended, and a worker that falls silent loses it to another (XAUTOCLAIM).
Idempotent: a job is its id; sent again it is found, done again it writes the same objects. After `max_deliveries` it is dead.

    {prefix}:jobs       stream of {job: id}, consumer group `workers`
    {prefix}:dead       stream of {job: id, why: text}, for people
    {prefix}:job:{id}   hash: asked, request, state, deliveries, created, finished, outcome, why
"""

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sdxs.errors import AlreadyExists, NotFound, Overloaded
from sdxs.v1 import gateway_pb2
from services.fabric.job_scripts import DELIVER, END, HEARTBEAT, LEAVE, SUBMIT
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

GROUP = "workers"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delivery:
    """A job in a worker's hands. `number` counts from 1."""

    entry: bytes
    job_id: str
    request: bytes
    number: int


class JobQueue:
    """Both ends of the queue, on a `redis.asyncio.Redis`. Raises redis.RedisError when Redis does not answer."""

    def __init__(self, redis: Any, settings: ServingSettings, prefix: str = "sdxs") -> None:
        self._redis = redis
        self._settings = settings
        self._stream = f"{prefix}:jobs"
        self._dead = f"{prefix}:dead"
        self._prefix = prefix
        scripts = (SUBMIT, DELIVER, HEARTBEAT, END, LEAVE)
        self._submit, self._count, self._heartbeat, self._conclude, self._leave = map(redis.register_script, scripts)

    def _key(self, job_id: str) -> str:
        return f"{self._prefix}:job:{job_id}"

    async def open(self) -> None:
        """Make the consumer group, if nobody has."""
        try:
            await self._redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def close(self) -> None:
        """Hang up."""
        await self._redis.aclose()

    async def submit(self, job_id: str, asked: bytes, request: bytes) -> str:
        """Queue a job once; the same id and the same `asked` again only tell its state, a name of JobState.

        `asked` is what the client sent, `request` the same with what the server chose (the seed), so that every delivery
        does the same. Raises AlreadyExists when the id stands for something else, Overloaded when the queue is full.
        """
        fingerprint = hashlib.sha256(asked).hexdigest()
        keys = [self._stream, self._key(job_id)]
        answer = await self._submit(keys=keys, args=[job_id, fingerprint, request, time.time(), self._settings.max_queued_jobs])
        if answer == b"full":
            raise Overloaded(f"{self._settings.max_queued_jobs} jobs wait already")
        if answer == b"other":
            raise AlreadyExists(f"request_id {job_id!r} stands for another request")
        return str(answer.decode())

    async def get(self, job_id: str) -> gateway_pb2.GetJobResponse:
        """The job's state, without URLs. Raises NotFound for an id nobody submitted, or long ago."""
        job = await self._redis.hgetall(self._key(job_id))
        if not job:
            raise NotFound(f"no job {job_id!r}")
        response = gateway_pb2.GetJobResponse.FromString(job.get(b"outcome", b""))
        response.job_id = job_id
        response.state = job[b"state"].decode()
        response.deliveries = int(job.get(b"deliveries", 0))
        response.created.FromNanoseconds(int(float(job[b"created"]) * 1e9))
        if b"finished" in job:
            response.finished.FromNanoseconds(int(float(job[b"finished"]) * 1e9))
        return response

    async def backlog(self) -> int:
        """Jobs that wait or are in a worker's hands."""
        return int(await self._redis.xlen(self._stream))

    async def take(self, consumer: str, wait_s: float) -> Delivery | None:
        """The next job: one whose worker fell silent, else a new one; None when none comes within `wait_s`."""
        idle_ms = int(self._settings.job_visibility_s * 1000)
        claimed = await self._redis.xautoclaim(self._stream, GROUP, consumer, idle_ms, start_id="0-0", count=1)
        entries = claimed[1]
        if not entries:
            streams = {self._stream: ">"}
            found = await self._redis.xreadgroup(GROUP, consumer, streams, count=1, block=max(1, int(wait_s * 1000)))
            entries = found[0][1] if found else []
        for entry, fields in entries:
            return await self._deliver(entry, fields.get(b"job", b"").decode(errors="replace"))
        return None

    async def _deliver(self, entry: bytes, job_id: str) -> Delivery | None:
        """Count the delivery; end the entry instead when its job is over, unknown, or tried too often."""
        most = self._settings.job_max_deliveries
        answer = await self._count(keys=[self._key(job_id)], args=[most])
        if not answer:
            logger.warning("entry %s of the queue is dropped: job %r is over or unknown", entry.decode(), job_id)
            await self._forget(entry)
            return None
        number, request, why = answer
        delivery = Delivery(entry, job_id, request, number)
        if number > most:
            await self.bury(delivery, (why or b"its worker died").decode())
            return None
        return delivery

    async def keep(self, delivery: Delivery, consumer: str) -> bool:
        """Show that the worker lives; False when the job has been given to another."""
        return bool(await self._heartbeat(keys=[self._stream], args=[GROUP, consumer, delivery.entry, 0]))

    async def retry(self, delivery: Delivery, consumer: str, why: str) -> None:
        """Let it be delivered again, after a pause that doubles with each delivery."""
        pause_s = min(2.0 ** (delivery.number - 1), self._settings.job_visibility_s)
        idle_ms = int((self._settings.job_visibility_s - pause_s) * 1000)
        if await self._heartbeat(keys=[self._stream], args=[GROUP, consumer, delivery.entry, idle_ms]):
            await self._redis.hset(self._key(delivery.job_id), "why", why)

    async def leave(self, consumer: str) -> None:
        """Forget a worker that takes no more jobs, unless some are still in its name."""
        await self._leave(keys=[self._stream], args=[GROUP, consumer])

    async def succeed(self, delivery: Delivery, outcome: gateway_pb2.GetJobResponse) -> bool:
        """The job is done; `outcome` holds its images and receipt. False when it was over before: then nothing changes."""
        return await self._end(delivery, "JOB_STATE_SUCCEEDED", outcome)

    async def refuse(self, delivery: Delivery, error: gateway_pb2.JobError) -> bool:
        """The job can never succeed. False when it was over before: then nothing changes."""
        return await self._end(delivery, "JOB_STATE_FAILED", gateway_pb2.GetJobResponse(error=error))

    async def bury(self, delivery: Delivery, why: str) -> None:
        """The job was delivered too often: FAILED for its owner, and a line in the stream of the dead."""
        message = f"given up after {self._settings.job_max_deliveries} deliveries; the last: {why}"
        if await self.refuse(delivery, gateway_pb2.JobError(code="ABORTED", message=message)):
            await self._redis.xadd(self._dead, {"job": delivery.job_id, "why": message}, maxlen=10_000)

    async def _end(self, delivery: Delivery, state: str, outcome: gateway_pb2.GetJobResponse) -> bool:
        """State, outcome, acknowledgement: all or nothing."""
        keys = [self._stream, self._key(delivery.job_id)]
        ttl_s = self._settings.job_ttl_s
        args = [GROUP, delivery.entry, state, outcome.SerializeToString(), time.time(), ttl_s]
        return bool(await self._conclude(keys=keys, args=args))

    async def _forget(self, entry: bytes) -> None:
        """Take an entry off the stream."""
        await self._redis.xack(self._stream, GROUP, entry)
        await self._redis.xdel(self._stream, entry)


def open_queue(settings: ServingSettings) -> JobQueue:
    """The queue at `settings.redis_url`; connects at the first call."""
    return JobQueue(Redis.from_url(settings.redis_url, protocol=2), settings)
