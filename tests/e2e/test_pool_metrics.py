"""The pool's metrics as Prometheus would read them from a Ray that collects any."""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import ray

from tests.pool_fakes import Ask, Doubler
from trainer.pool.client import Limits, PoolClient
from trainer.pool.member import members
from trainer.session import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def scraped(url: str, wanted: str) -> dict[str, float]:
    """Values of the pool's metrics by name, once `wanted` is among them."""
    end = time.monotonic() + 60
    while True:
        text = urlopen(url, timeout=10).read().decode()
        found = {m[1]: float(m[2]) for m in re.finditer(r"^ray_(sdxs_teacher_\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}
        if wanted in found:
            return found
        assert time.monotonic() < end, sorted(found)
        time.sleep(1)


def test_what_was_answered_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    with ray_session():
        client = PoolClient(members(Doubler, 1, Limits(max_batch=1), num_cpus=0), Limits())
        asked: list[Any] = [Ask(np.zeros((3, 2)), 0.01) for _ in range(4)]
        for reply in [client.submit(request) for request in asked]:
            reply.result()
        [node] = ray.nodes()
        found = scraped(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", "sdxs_teacher_images_total")
    assert found["sdxs_teacher_images_total"] == 12 and found["sdxs_teacher_requests_total"] == 4
    for histogram in ("batch_images", "forward_seconds", "image_seconds"):
        assert found[f"sdxs_teacher_{histogram}_count"] == 4
    assert 0.04 <= found["sdxs_teacher_busy_seconds_total"] < 1
    assert found["sdxs_teacher_queue_depth"] == 0
