"""Servers for integration tests."""

from collections.abc import Iterator

import pytest

from sdxs.embedded import redis_server


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis-compatible server of its own: on the one `sdxs serve` is tested with, its worker would take the jobs."""
    with redis_server(tmp_path_factory.mktemp("redis")) as variables:
        yield variables["SDXS_REDIS_URL"]
