"""The teacher pool on a Ray of its own: separate processes, one of them killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.models import tiny_teacher
from trainer.pool import TeacherPool
from trainer.session import ray_session
from trainer.teacher import Denoise, InProcessTeacher, Teacher


@pytest.mark.timeout(240)
def test_a_pool_survives_the_death_of_a_member_with_requests_in_flight(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    generator = np.random.default_rng(0)
    requests = [
        Denoise(generator.standard_normal((2, 8, 4, 4)).astype(np.float32), np.array([3, 700 + i]), ["red circle", "a"], 2.0)
        for i in range(24)
    ]
    with ray_session():
        pool = TeacherPool(folder, 2)
        client, before = pool.client(), pool.statistics()
        pending = [client.submit(request) for request in requests]
        os.kill(int(before[0]["pid"]), signal.SIGKILL)
        replies = [reply.result() for reply in pending]
        after = pool.statistics()
        pool.close()
    alone = InProcessTeacher(Teacher(folder))
    for request, reply in zip(requests, replies, strict=True):
        np.testing.assert_allclose(reply[0], alone.submit(request).result()[0], atol=2e-3)
    assert after[0]["pid"] != before[0]["pid"] and after[1]["pid"] == before[1]["pid"]
    assert client.outstanding == [0, 0]
