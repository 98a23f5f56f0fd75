"""Where jobs are handed in, asked about, watched and cancelled. Redis and the store not answering is UNAVAILABLE."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator

from redis.exceptions import RedisError

from sdxs.errors import InvalidRequest, Unavailable
from sdxs.store import ObjectStore, open_store
from sdxs.v1 import gateway_pb2
from services.fabric.job_changes import JobChanges
from services.fabric.job_records import OVER
from services.fabric.job_urls import has_images, sign_urls
from services.fabric.job_webhooks import check_url
from services.fabric.jobs import JobQueue, open_queue
from services.settings import ServingSettings

_PAGE, _MAX_PAGE = 50, 200
_LOOK_S = 1.0  # between two looks at a watched job that tells nothing: its position changes with other jobs


class JobDesk:
    """On a queue and, for the URLs of images, a store."""

    def __init__(self, queue: JobQueue, store: Callable[[], ObjectStore], url_ttl_s: int) -> None:
        self._queue = queue
        self._changes = JobChanges(queue)
        self._store = functools.cache(store)  # opened at the first job: images without jobs need no store
        self._url_ttl_s = url_ttl_s
        self._leaving = False

    async def submit(
        self, job_id: str, asked: bytes, order: gateway_pb2.SubmitJobRequest, tenant: str
    ) -> gateway_pb2.SubmitJobResponse:
        """See JobQueue.submit. Raises what `check_url` does for its webhook too."""
        if order.webhook_url:
            await check_url(order.webhook_url, self._queue.settings)
        with _answering():
            state = await self._queue.submit(job_id, asked, order, tenant)
        return gateway_pb2.SubmitJobResponse(job_id=job_id, state=state)

    async def get(self, job_id: str) -> gateway_pb2.GetJobResponse:
        """The job with a fresh URL for each image."""
        with _answering():
            job = await self._queue.get(job_id)
        if has_images(job):
            await asyncio.to_thread(lambda: sign_urls(job, self._store(), self._url_ttl_s))
        return job

    async def list_jobs(self, request: gateway_pb2.ListJobsRequest) -> gateway_pb2.ListJobsResponse:
        """One page. Raises InvalidRequest."""
        size = request.page_size or _PAGE
        if size > _MAX_PAGE:
            raise InvalidRequest("page_size", size, f"1 to {_MAX_PAGE}, 0 for {_PAGE}")
        token = request.page_token
        if token and not (token.isascii() and token.isdigit() and len(token) < 16):
            raise InvalidRequest("page_token", token, "a next_page_token")
        unknown = set(request.states) - set(gateway_pb2.JobState.values()[1:])
        if unknown:
            raise InvalidRequest("states", min(unknown), "some of " + ", ".join(gateway_pb2.JobState.keys()[1:]))
        with _answering():
            jobs, before = await self._queue.list_jobs(frozenset(request.states), int(token) if token else None, size)
        return gateway_pb2.ListJobsResponse(jobs=jobs, next_page_token="" if before is None else str(before))

    async def watch(self, job_id: str) -> AsyncIterator[gateway_pb2.GetJobResponse]:
        """The job without images and items, at once and at each change; at last all of the ended job. Raises Unavailable after `leave`."""
        told = None
        with self._changes.of(job_id) as changed:
            while True:
                changed.clear()
                with _answering():
                    job = await self._queue.get(job_id, whole=False)
                if job.state in OVER:
                    yield await self.get(job_id)
                    return
                if job != told:
                    yield job
                    told = job
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await changed.wait()
                if self._leaving:
                    raise Unavailable("this server is stopping; another goes on")

    async def cancel(self, job_id: str) -> gateway_pb2.GetJobResponse:
        """The cancelled job. Raises NotFound, or PreconditionFailed when it has ended."""
        with _answering():
            await self._queue.cancel(job_id)
        return await self.get(job_id)

    def leave(self) -> None:
        """Send watchers away, who would keep a stopping server waiting."""
        self._leaving = True
        self._changes.wake()

    async def close(self) -> None:
        """Hang up."""
        await self._queue.close()


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Raises Unavailable when Redis does not answer."""
    try:
        yield
    except RedisError as error:
        raise Unavailable("the job queue does not answer") from error


def open_desk(settings: ServingSettings) -> JobDesk | None:
    """The desk of the queue and the store the settings name; None without a queue."""
    if not settings.redis_url:
        return None
    return JobDesk(open_queue(settings), lambda: open_store(settings, "artifacts"), settings.url_ttl_s)
