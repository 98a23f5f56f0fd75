"""Servers for integration tests."""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from sdxs.embedded import redis_server
from services.fabric.jobs import JobQueue
from tests.jobs import settings


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis-compatible server of its own: on the one `sdxs serve` is tested with, its worker would take the jobs."""
    with redis_server(tmp_path_factory.mktemp("redis")) as variables:
        yield variables["SDXS_REDIS_URL"]


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator["Redis"]:
    client = Redis.from_url(redis_url, protocol=2)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def queue(redis: "Redis") -> JobQueue:
    queue = JobQueue(redis, settings())
    await queue.open()
    return queue
