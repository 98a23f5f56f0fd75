"""The job queue on Redis: a stream of ids and a consumer group for each priority, one hash per job.

At least once: an entry stays pending until its job has ended, and a worker that falls silent loses it to another (XAUTOCLAIM).
Idempotent: a job is its id; sent again it is found, done again it writes the same objects. After `job_max_deliveries` without
progress it is dead. Bounded: what does not fit is refused, nothing is trimmed away.

    {sdxs}:jobs:{priority}  stream of {job: id}, consumer group `workers`
    {sdxs}:waiting          sorted set of the jobs nobody has begun, in their order: a position is a rank
    {sdxs}:index            sorted set of all jobs, in order of creation
    {sdxs}:expiring         sorted set of the ended, by when they leave the index
    {sdxs}:counters         hash: queued and taken (so many jobs ever), bytes (of the requests of jobs that have not ended)
    {sdxs}:webhooks         sorted set of ended jobs whose webhook is to be called, by when (services.fabric.job_webhooks)
    {sdxs}:dead             stream of {job: id, why: text}, for people (services.fabric.dead_jobs)
    {sdxs}:job:{id}         hash: asked, request, class, tenant, state, entry, deliveries, tries, created, finished, outcome, why, ...;
                            also the channel that tells of its changes (services.fabric.job_changes)
    {sdxs}:job:{id}:items   hash: what a batch has so far, by index

The braces of the prefix put all keys into one slot of a Redis Cluster, as scripts over several of them need; so one queue lives on one
shard. Streams know no rank of an entry, hence `waiting`: one ZADD and one ZREM a job, for positions at O(log n).
"""

import functools
import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sdxs.errors import AlreadyExists, NotFound, Overloaded, PreconditionFailed
from sdxs.v1 import gateway_pb2
from services.fabric import job_scripts as scripts
from services.fabric.job_records import FIELDS, read_job
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

GROUP = "workers"
PREFIX = "{sdxs}"
CLASSES = ("high", "normal", "low")
"""In the order of JobPriority, from 1."""

_CLAIM_PAUSE_S = 1.0  # a worker looks for jobs of silent workers at most so often
_LIST_MOST = 1000  # jobs one page looks at


@dataclass(frozen=True)
class Delivery:
    """A job in a worker's hands. `request` is a SubmitJobRequest; `number` counts from 1 and, in a batch, anew with each item made."""

    entry: bytes
    job_class: int
    job_id: str
    request: bytes
    number: int
    created: float = 0.0
    """When it was submitted, in seconds since 1970."""
    tenant: str = ""
    done: frozenset[int] = frozenset()
    """Items of a batch that earlier deliveries made."""


class JobQueue:
    """Both ends of the queue, on a `redis.asyncio.Redis`. Raises redis.RedisError when Redis does not answer."""

    def __init__(self, redis: Any, settings: ServingSettings, prefix: str = PREFIX) -> None:
        self.redis = redis
        self.settings = settings
        self.prefix = prefix
        self.streams = [f"{prefix}:jobs:{name}" for name in CLASSES]
        names = ("waiting", "index", "expiring", "counters", "webhooks", "dead", "job:")
        self._keys = [*self.streams, *(f"{prefix}:{name}" for name in names)]
        self._register = functools.cache(redis.register_script)
        self._next_claim = 0.0

    def key(self, job_id: str) -> str:
        """Of the job's hash and of the channel that tells of its changes."""
        return f"{self.prefix}:job:{job_id}"

    async def run(self, script: str, *args: Any) -> Any:
        """One of job_scripts."""
        return await self._register(script)(keys=self._keys, args=args)

    async def open(self) -> None:
        """Make the consumer groups, if nobody has."""
        for stream in self.streams:
            try:
                await self.redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def close(self) -> None:
        """Hang up."""
        await self.redis.aclose()

    async def submit(self, job_id: str, asked: bytes, order: gateway_pb2.SubmitJobRequest, tenant: str = "") -> str:
        """Queue a job once; the same id and the same `asked` again only tell its state, a name of JobState.

        `asked` is what the client sent, `order` the same with what the server chose (the seeds), so that every delivery
        does the same. Raises AlreadyExists when the id stands for something else, Overloaded when the queue is full.
        """
        kept = gateway_pb2.SubmitJobRequest(requests=order.requests)
        if order.HasField("request"):
            kept.request.CopyFrom(order.request)
        job_class = order.priority or gateway_pb2.JOB_PRIORITY_NORMAL
        total, batch = (len(order.requests), 1) if order.requests else (1, 0)
        about = (job_class, order.webhook_url, total, batch, tenant)
        limits = (self.settings.max_queued_jobs, self.settings.max_queued_bytes)
        fingerprint = hashlib.sha256(tenant.encode() + b"\0" + asked).hexdigest()
        answer = await self.run(scripts.SUBMIT, job_id, fingerprint, kept.SerializeToString(), time.time(), *about, *limits)
        if answer == b"other":
            raise AlreadyExists(f"request_id {job_id!r} stands for another request")
        self.check_room(answer)
        return str(answer.decode())

    def check_room(self, answer: bytes) -> None:
        """Raises Overloaded when a script says that there is none."""
        reasons = {
            b"full": f"{self.settings.max_queued_jobs} jobs wait already",
            b"large": f"with this job more than {self.settings.max_queued_bytes} bytes of requests would wait",
            b"webhooks": f"{self.settings.max_queued_jobs} webhooks wait already",
        }
        if answer in reasons:
            raise Overloaded(reasons[answer], retry_after_s=self.settings.job_retry_after_s)

    async def get(self, job_id: str, whole: bool = True) -> gateway_pb2.GetJobResponse:
        """The job, without URLs; not `whole`: without images and items. Raises NotFound for an id nobody submitted, or long ago."""
        pipe = self.redis.pipeline(transaction=True)
        pipe.hmget(self.key(job_id), FIELDS)
        pipe.zrank(f"{self.prefix}:waiting", job_id)
        items = f"{self.key(job_id)}:items"
        pipe.hgetall(items) if whole else pipe.hlen(items)
        values, rank, made = await pipe.execute()
        job = read_job(job_id, values, rank, made)
        if job is None:
            raise NotFound(f"no job {job_id!r}")
        return job

    async def list_jobs(
        self, states: frozenset[int], before: int | None, page_size: int
    ) -> tuple[list[gateway_pb2.GetJobResponse], int | None]:
        """Jobs in one of these states (none: all), newest first, without images and items; and the `before` of the next page.

        Reads 1000 jobs at most: a page may be short, and only None says that it is the last.
        """
        found: list[gateway_pb2.GetJobResponse] = []
        for _ in range(0, _LIST_MOST, 100):
            highest = "+inf" if before is None else f"({before}"
            window = await self.redis.zrevrangebyscore(f"{self.prefix}:index", highest, "-inf", 0, 100, withscores=True)
            for job, number in zip(await self._read([name.decode() for name, _ in window]), window, strict=True):
                before = int(number[1])
                if job is not None and (not states or job.state in states):
                    found.append(job)
                if len(found) == page_size:
                    return found, before
            if len(window) < 100:
                return found, None
        return found, before

    async def _read(self, names: list[str]) -> list[gateway_pb2.GetJobResponse | None]:
        """Their jobs; None for one that has been forgotten."""
        pipe = self.redis.pipeline(transaction=False)
        for name in names:
            pipe.hmget(self.key(name), FIELDS)
            pipe.zrank(f"{self.prefix}:waiting", name)
            pipe.hlen(f"{self.key(name)}:items")
        answers = await pipe.execute()
        return [read_job(name, *answers[3 * i : 3 * i + 3]) for i, name in enumerate(names)]

    async def backlog(self) -> int:
        """Jobs that wait or are in a worker's hands."""
        pipe = self.redis.pipeline(transaction=False)
        for stream in self.streams:
            pipe.xlen(stream)
        return sum(await pipe.execute())

    async def cancel(self, job_id: str) -> None:
        """End a job that has not ended. Raises NotFound, or PreconditionFailed when it has."""
        before = (await self.run(scripts.CANCEL, job_id, time.time(), self.settings.job_ttl_s)).decode()
        if not before:
            raise NotFound(f"no job {job_id!r}")
        if before not in ("JOB_STATE_QUEUED", "JOB_STATE_RUNNING"):
            raise PreconditionFailed(f"job {job_id!r} has ended: {before.removeprefix('JOB_STATE_')}")

    async def take(self, consumer: str, wait_s: float) -> Delivery | None:
        """The next job: one whose worker fell silent, else a new one; None when none comes within `wait_s`."""
        kind, *facts = await self._take(consumer)
        if kind == b"none" and wait_s > 0:
            after = dict(zip(self.streams, facts, strict=True))
            if not await self.redis.xread(after, count=1, block=max(1, int(wait_s * 1000))):
                return None
            kind, *facts = await self._take(consumer)
        if kind == b"none":
            return None
        entry, job_class, name, *told = facts
        job_id = name.decode(errors="replace")
        if kind == b"dropped":
            logger.warning("entry %s of the queue is dropped: job %r is over or unknown", entry.decode(), job_id)
            return None
        request, number, why, created, tenant, done = told
        delivery = Delivery(
            entry, job_class, job_id, request, number, float(created), tenant.decode(), frozenset(map(int, done))
        )
        if kind == b"spent":
            await self.bury(delivery, (why or b"its worker died").decode(errors="replace"))
            return None
        return delivery

    async def _take(self, consumer: str) -> Any:
        """One look at the queue; at the jobs of others only now and then."""
        idle_ms, now = -1, time.monotonic()
        if now >= self._next_claim:
            idle_ms = int(self.settings.job_visibility_s * 1000)
        answer = await self.run(scripts.TAKE, consumer, idle_ms, self.settings.job_max_deliveries)
        if idle_ms >= 0 and answer[0] == b"none":
            self._next_claim = now + min(_CLAIM_PAUSE_S, self.settings.job_visibility_s / 4)
        return answer

    async def keep(self, delivery: Delivery, consumer: str) -> bool:
        """Show that the worker lives; False when the job has ended, as by `cancel`, or has been given to another."""
        return bool(await self.run(scripts.KEEP, consumer, delivery.job_class, delivery.entry, 0))

    async def retry(self, delivery: Delivery, consumer: str, why: str) -> None:
        """Let it be delivered again, after a pause that doubles with each delivery."""
        pause_s = min(2.0 ** (delivery.number - 1), self.settings.job_visibility_s)
        idle_ms = int((self.settings.job_visibility_s - pause_s) * 1000)
        if await self.run(scripts.KEEP, consumer, delivery.job_class, delivery.entry, idle_ms):
            await self.redis.hset(self.key(delivery.job_id), "why", why)

    async def leave(self, consumer: str) -> None:
        """Forget a worker that takes no more jobs, unless some are still in its name."""
        await self.run(scripts.LEAVE, consumer)

    async def put_item(self, delivery: Delivery, index: int, item: gateway_pb2.JobItem) -> bool:
        """One item of a batch is made, or can never be. False when the job is over: then nothing changes."""
        failed = int(item.state == gateway_pb2.JOB_STATE_FAILED)
        args = (delivery.job_id, delivery.entry, index, item.SerializeToString(), failed)
        return bool(await self.run(scripts.ITEM, *args))

    async def succeed(self, delivery: Delivery, outcome: gateway_pb2.GetJobResponse) -> bool:
        """The job is done; `outcome` holds its images and receipt. False when it was over before: then nothing changes."""
        return await self._end(delivery, "JOB_STATE_SUCCEEDED", outcome)

    async def refuse(self, delivery: Delivery, error: gateway_pb2.JobError) -> bool:
        """The job can never succeed. False when it was over before: then nothing changes."""
        return await self._end(delivery, "JOB_STATE_FAILED", gateway_pb2.GetJobResponse(error=error))

    async def bury(self, delivery: Delivery, why: str) -> bool:
        """The job was delivered too often: FAILED for its owner, and a line in the stream of the dead."""
        message = f"given up after {self.settings.job_max_deliveries} deliveries; the last: {why}"
        error = gateway_pb2.JobError(code="ABORTED", message=message)
        return await self._end(delivery, "JOB_STATE_FAILED", gateway_pb2.GetJobResponse(error=error), message)

    async def _end(self, delivery: Delivery, state: str, outcome: gateway_pb2.GetJobResponse, dead: str = "") -> bool:
        """State, outcome, acknowledgement: all or nothing."""
        ttl_s = self.settings.dead_job_ttl_s if dead else self.settings.job_ttl_s
        args = (delivery.job_id, state, outcome.SerializeToString(), time.time(), ttl_s, dead, self.settings.max_dead_jobs)
        return bool(await self.run(scripts.END, *args))


def open_queue(settings: ServingSettings) -> JobQueue:
    """The queue at `settings.redis_url`; connects at the first call."""
    return JobQueue(Redis.from_url(settings.redis_url, protocol=2), settings)
