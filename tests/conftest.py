"""Fixtures for all tests: a tiny random bundle and real embedded servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")

os.environ.setdefault("RAY_AUTH_MODE", "token")  # as every command sets it; Ray reads it when the first test module imports it


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed bundle named `tiny` with random weights: 32x32 images from 8x4x4 latents, DDIM, v-prediction."""
    from sdxs.bundle import seal
    from tests.models import tiny_folder

    folder = tiny_folder(tmp_path_factory.mktemp("bundles") / "tiny")
    seal(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def control_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two ControlNets that are random too: `lines` (edge, sketch) and `paint` (colour)."""
    from tests.controlnets import control_folder

    return control_folder(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def redis_variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real Redis-compatible server; the SDXS_* variables that lead to it."""
    from sdxs.embedded import redis_server

    with redis_server(tmp_path_factory.mktemp("redis")) as variables:
        yield variables


@pytest.fixture(scope="session")
def s3_variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server; the SDXS_* variables that lead to it."""
    from sdxs.embedded import s3_server

    with s3_server(tmp_path_factory.mktemp("s3")) as variables:
        yield variables
