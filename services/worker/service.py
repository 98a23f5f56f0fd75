"""The worker's loop: take a job, generate, store, say so.

Knows the queue, the object store and one function that generates; does not know networks or where they run.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from sdxs.errors import Overloaded
from sdxs.images import extension, media_type
from sdxs.store import ObjectStore
from sdxs.v1 import decoder_pb2, gateway_pb2
from services.fabric.deadline import Deadline, Priority
from services.fabric.jobs import Delivery, JobQueue
from services.fabric.keys import RESULTS
from services.settings import ServingSettings
from services.worker.batch import REFUSALS, AllRefused, job_error, make_batch
from services.worker.facts import metadata_of
from services.worker.sweep import Sweeper
from services.worker.webhooks import Webhooks

logger = logging.getLogger(__name__)

JOB_PATIENCE = 10
"""Times job_visibility_s: how long one request of a job may take, an outage that is waited out included."""

Generate = Callable[[bytes, Deadline], Awaitable[bytes]]


class Worker:
    """Up to `job_concurrency` jobs at a time from one queue, the webhooks of ended ones, and the sweep of the store."""

    def __init__(
        self, queue: JobQueue, store: Callable[[], ObjectStore], generate: Generate, settings: ServingSettings
    ) -> None:
        self._queue = queue
        self._store = functools.cache(store)
        self._generate = generate
        self._webhooks = Webhooks(queue, self._store)
        self._sweeper = Sweeper(queue, self._store, settings)
        self._visibility_s = settings.job_visibility_s
        self._beat_s = min(1.0, settings.job_visibility_s / 4)  # a cancelled job is dropped at the next beat
        self._concurrency = settings.job_concurrency
        self._at_once = settings.job_requests_at_once
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._stopping = False

    async def run(self) -> None:
        """Work until `stop`."""
        await asyncio.gather(*(self._work() for _ in range(self._concurrency)), self._webhooks.run(), self._sweeper.run())
        try:
            await self._queue.leave(self._consumer)
        except RedisError as error:
            logger.warning("the queue does not answer: %s", error)

    def stop(self) -> None:
        """End after the jobs in hand."""
        self._stopping = True
        self._webhooks.stop()
        self._sweeper.stop()

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
        """One job to its end, or back to the queue; dropped when it is cancelled or given to another."""
        work = asyncio.create_task(self._make(delivery))
        try:
            while not (await asyncio.wait([work], timeout=self._beat_s))[0]:
                if not await self._keep(delivery):
                    logger.warning("job %s has ended or was given to another worker", delivery.job_id)
                    return
            await self._conclude(delivery, work)
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work

    async def _keep(self, delivery: Delivery) -> bool:
        """Whether the job is still in hand; a heartbeat that fails is no reason to stop."""
        try:
            return await self._queue.keep(delivery, self._consumer)
        except RedisError as error:
            logger.warning("no heartbeat for job %s: %s", delivery.job_id, error)
            return True

    async def _conclude(self, delivery: Delivery, work: "asyncio.Task[gateway_pb2.GetJobResponse]") -> None:
        """Say what came of it."""
        try:
            if not await self._queue.succeed(delivery, await work):
                logger.warning("job %s was over before this worker had done it", delivery.job_id)
        except (*REFUSALS, AllRefused) as error:
            await self._queue.refuse(delivery, job_error(error))
        except RedisError:
            raise
        except Exception as error:
            logger.warning("job %s, delivery %d: %r", delivery.job_id, delivery.number, error)
            await self._queue.retry(delivery, self._consumer, f"{type(error).__name__}: {error}")

    async def _make(self, delivery: Delivery) -> gateway_pb2.GetJobResponse:
        """Generate and store. The keys follow from the job's id, so doing it twice changes nothing."""
        order = gateway_pb2.SubmitJobRequest.FromString(delivery.request)
        once = functools.partial(self._once, delivery)
        if order.requests:
            return await make_batch(self._queue, delivery, order.requests, once, self._at_once)
        made = await once(order.request, f"{RESULTS}{delivery.job_id}")
        return gateway_pb2.GetJobResponse(images=made.images, receipt=made.receipt)

    async def _once(self, delivery: Delivery, request: gateway_pb2.GenerateRequest, folder: str) -> gateway_pb2.JobItem:
        """One request to its images in the store, `folder`/0.png and so on. A gateway that is full is asked again, as late as it says."""
        queued_s = time.time() - delivery.created
        # After those who wait on the line.
        deadline = Deadline.after(JOB_PATIENCE * self._visibility_s, Priority.LOW, delivery.tenant)
        payload = request.SerializeToString()
        while True:
            try:
                generated = gateway_pb2.GenerateResponse.FromString(await self._generate(payload, deadline))
                break
            except Overloaded as error:
                pause_s = (error.retry_after_s or 1.0) * random.uniform(1, 2)
                if deadline.within(pause_s).at == deadline.at:
                    raise
                await asyncio.sleep(pause_s)
        generated.receipt.job_queue_seconds = queued_s
        item = gateway_pb2.JobItem(state=gateway_pb2.JOB_STATE_SUCCEEDED, receipt=generated.receipt)
        for index, image in enumerate(generated.images):
            key = f"{folder}/{index}.{extension(image.format)}"
            about = metadata_of(delivery.job_id, index, generated.receipt)
            await asyncio.to_thread(self._put, key, image, about)
            sha256 = hashlib.sha256(image.data).hexdigest()
            item.images.add(key=key, format=image.format, size=len(image.data), sha256=sha256)
        return item

    def _put(self, key: str, image: decoder_pb2.Image, about: dict[str, str]) -> None:
        """One image into the store."""
        self._store().put_bytes(key, image.data, media_type(image.format), about)
