"""Servers for integration tests."""

import pytest


@pytest.fixture(scope="session")
def redis_url(redis_variables: dict[str, str]) -> str:
    return redis_variables["SDXS_REDIS_URL"]
