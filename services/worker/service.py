"""The worker's loop: take a job, generate, store, say so.

Knows the queue, the object store and one function that generates; does not know networks or where they run.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import socket
import uuid
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed
from sdxs.images import extension, media_type
from sdxs.store import ObjectStore
from sdxs.v1 import decoder_pb2, gateway_pb2
from services.fabric.deadline import Deadline
from services.fabric.jobs import Delivery, JobQueue
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

JOB_PATIENCE = 10
"""Times job_visibility_s: how long one delivery of a job may take, an outage that is waited out included."""

Generate = Callable[[bytes, Deadline], Awaitable[bytes]]


class Worker:
    """Up to `job_concurrency` jobs at a time from one queue."""

    def __init__(
        self, queue: JobQueue, store: Callable[[], ObjectStore], generate: Generate, settings: ServingSettings
    ) -> None:
        self._queue = queue
        self._store = functools.cache(store)
        self._generate = generate
        self._visibility_s = settings.job_visibility_s
        self._concurrency = settings.job_concurrency
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._stopping = False

    async def run(self) -> None:
        """Work until `stop`."""
        await asyncio.gather(*(self._work() for _ in range(self._concurrency)))
        try:
            await self._queue.leave(self._consumer)
        except RedisError as error:
            logger.warning("the queue does not answer: %s", error)

    def stop(self) -> None:
        """End after the jobs in hand."""
        self._stopping = True

    async def _work(self) -> None:
        """One job after the other; an outage of Redis is waited out."""
        opened = False
        while not self._stopping:
            try:
                if not opened:
                    await self._queue.open()
                    opened = True
                delivery = await self._queue.take(self._consumer, wait_s=min(1.0, self._visibility_s / 4))
                if delivery is not None:
                    await self._do(delivery)
            except RedisError as error:
                logger.warning("the queue does not answer: %s", error)
                opened = False  # a Redis that lost its memory has lost the group too
                await asyncio.sleep(1.0)

    async def _do(self, delivery: Delivery) -> None:
        """One job to its end, or back to the queue."""
        heart = asyncio.create_task(self._beat(delivery))
        try:
            if not await self._queue.succeed(delivery, await self._make(delivery)):
                logger.warning("job %s was over before this worker had done it", delivery.job_id)
        except (InvalidRequest, NotFound, PreconditionFailed) as error:
            await self._queue.refuse(delivery, gateway_pb2.JobError(code=error.code, message=str(error), field=error.field))
        except RedisError:
            raise
        except Exception as error:
            logger.warning("job %s, delivery %d: %r", delivery.job_id, delivery.number, error)
            await self._queue.retry(delivery, self._consumer, f"{type(error).__name__}: {error}")
        finally:
            heart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await heart

    async def _beat(self, delivery: Delivery) -> None:
        """Keep the job while it is in hand; a heartbeat that fails is no reason to stop."""
        while True:
            await asyncio.sleep(self._visibility_s / 3)
            try:
                if not await self._queue.keep(delivery, self._consumer):
                    logger.warning("job %s was given to another worker", delivery.job_id)
                    return
            except RedisError as error:
                logger.warning("no heartbeat for job %s: %s", delivery.job_id, error)

    async def _make(self, delivery: Delivery) -> gateway_pb2.GetJobResponse:
        """Generate and store. The keys follow from the job's id, so doing it twice changes nothing."""
        answer = await self._generate(delivery.request, Deadline.after(JOB_PATIENCE * self._visibility_s))
        generated = gateway_pb2.GenerateResponse.FromString(answer)
        outcome = gateway_pb2.GetJobResponse(receipt=generated.receipt)
        for index, image in enumerate(generated.images):
            key = f"jobs/{delivery.job_id}/{index}.{extension(image.format)}"
            await asyncio.to_thread(self._put, key, image)
            sha256 = hashlib.sha256(image.data).hexdigest()
            outcome.images.add(key=key, format=image.format, size=len(image.data), sha256=sha256)
        return outcome

    def _put(self, key: str, image: decoder_pb2.Image) -> None:
        """One image into the store."""
        self._store().put_bytes(key, image.data, media_type(image.format))
