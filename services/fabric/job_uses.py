"""What in the store the jobs of a queue still need: those that have not ended, and those that can still be asked about."""

from collections.abc import AsyncIterator, Iterable
from itertools import islice

from sdxs.v1 import gateway_pb2
from services.fabric.jobs import JobQueue

_PAGE = 200


async def known_jobs(queue: JobQueue, names: Iterable[str]) -> set[str]:
    """Those of these jobs that the queue has not forgotten. Raises redis.RedisError."""
    found = set[str]()
    rest = iter(names)
    while page := list(islice(rest, _PAGE)):
        pipe = queue.redis.pipeline(transaction=False)
        for name in page:
            pipe.exists(queue.key(name))
        found |= {name for name, there in zip(page, await pipe.execute(), strict=True) if there}
    return found


async def awaited_images(queue: JobQueue) -> set[str]:
    """Names of all images that kept requests speak of: of jobs that have not ended, and of dead ones, which may be replayed.

    Raises redis.RedisError.
    """
    found = set[str]()
    async for request in _kept_requests(queue):
        order = gateway_pb2.SubmitJobRequest.FromString(request)
        for each in order.requests or [order.request]:
            found |= {each.init_image_uri, *(control.image_uri for control in each.controls)}
    return found - {""}


async def _kept_requests(queue: JobQueue) -> AsyncIterator[bytes]:
    """As they wait."""
    page = list[bytes]()
    async for name, _ in queue.redis.zscan_iter(f"{queue.prefix}:index", count=_PAGE):
        page.append(name)
        if len(page) == _PAGE:
            for request in await _requests(queue, page):
                yield request
            page = []
    for request in await _requests(queue, page):
        yield request


async def _requests(queue: JobQueue, names: list[bytes]) -> list[bytes]:
    pipe = queue.redis.pipeline(transaction=False)
    for name in names:
        pipe.hget(queue.key(name.decode()), "request")
    return [request for request in await pipe.execute() if request]
