"""The teacher pool on a Ray of its own: separate processes, members and clients killed under load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from sdxs.errors import InvalidRequest, Unavailable
from tests.models import tiny_teacher
from tests.pool_fakes import Ask, Asker, Doubler
from trainer.pool.client import Limits, PoolClient, Share, TeacherPool
from trainer.pool.member import members
from trainer.session import ray_session
from trainer.specs import TeacherSpec
from trainer.teacher import Array, Denoise, Pending, Sample, Teacher

pytestmark = pytest.mark.timeout(240)
LIMITS = Limits(max_batch=16, max_queue=6, max_in_flight=24)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture(scope="module")
def pair() -> list[Any]:
    """Two members that are quick to start."""
    started = members(Doubler, 2, LIMITS, num_cpus=0)
    statistics(started)
    return started


def statistics(handles: list[Any]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = ray.get([handle.statistics.remote() for handle in handles])
    return found


def pids(handles: list[Any]) -> list[int]:
    return [int(member["pid"]) for member in statistics(handles)]


def asks(count: int, seconds: float = 0.0) -> list[Ask]:
    return [Ask(np.full((1 + index % 3, 4), index, np.float32), seconds) for index in range(count)]


def check(asked: list[Ask], pending: list[Pending]) -> None:
    for request, reply in zip(asked, pending, strict=True):
        np.testing.assert_array_equal(reply.result()[0], 2 * request.rows_BD)


def test_a_client_has_a_bounded_number_in_flight_and_waits_for_a_place(pair: list[Any]) -> None:
    client, outstanding, pending = PoolClient(pair, Limits(max_in_flight=2)), [], []
    asked = [Ask(np.full((1, 4), index, np.float32), 0.1 + index / 1000) for index in range(6)]
    for request in asked:
        pending.append(client.submit(request))  # type: ignore[arg-type]
        outstanding.append(sum(client.outstanding))
    assert max(outstanding) == 2 and client.statistics()["waited_seconds"] > 0.1
    check(asked, pending)
    assert client.outstanding == [0, 0]
    assert client.statistics()["bytes_sent"] == client.statistics()["bytes_received"] == 6 * 4 * 4


def submitted(client: PoolClient, asked: list[Ask]) -> list[Pending]:
    return [client.submit(request) for request in asked]  # type: ignore[arg-type]


def test_a_members_queue_is_bounded_and_refused_requests_are_answered_in_the_end(pair: list[Any]) -> None:
    client, refused = PoolClient(pair[:1], LIMITS), statistics(pair)[0]["refused"]
    asked = [Ask(np.full((1, 4), index, np.float32), 0.02 + index / 1000) for index in range(20)]
    pending = submitted(client, asked)
    assert statistics(pair)[0]["queue_depth"] <= LIMITS.max_queue
    check(asked, pending)
    assert statistics(pair)[0]["refused"] > refused and client.retries == 0


def test_an_application_error_is_raised_at_once_and_touches_no_other_request(pair: list[Any]) -> None:
    client, good = PoolClient(pair, LIMITS), asks(3)
    held, [failing], fine = (
        submitted(client, asks(2, 0.1)),
        submitted(client, [Ask(np.ones((1, 4)), wrong=True)]),
        submitted(client, good),
    )
    with pytest.raises(ValueError, match="wrong"):
        failing.result()
    check(good, fine)
    check(asks(2, 0.1), held)
    assert client.retries == 0 and client.outstanding == [0, 0]


def test_what_a_dead_member_had_goes_to_another_without_waiting_for_its_restart(pair: list[Any]) -> None:
    client, before, asked = PoolClient(pair, LIMITS), pids(pair), asks(12, 0.05)
    pending = submitted(client, asked)
    os.kill(before[0], signal.SIGKILL)
    check(asked, pending)
    back = pair[0].statistics.remote()
    assert ray.wait([back], timeout=0)[0] == [], "all were answered before the member was back"
    after = pids(pair)
    assert after[0] != before[0] and after[1] == before[1]
    assert client.retries > 0 and client.outstanding == [0, 0]


def test_survives_the_death_of_every_member_under_load(pair: list[Any]) -> None:
    client, before, asked = PoolClient(pair, LIMITS), pids(pair), asks(24, 0.05)
    pending = submitted(client, asked)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    check(asked, pending)
    assert not set(before) & set(pids(pair)) and client.outstanding == [0, 0]


def test_a_request_that_kills_members_is_given_up_and_its_neighbours_are_answered(pair: list[Any]) -> None:
    """On a single member, so that the others wait behind it at each death."""
    client, before, after = PoolClient(pair[:1], LIMITS), asks(2, 0.05), asks(4)
    first, [killer], last = (
        submitted(client, before),
        submitted(client, [Ask(np.ones((5, 4)), deadly=True)]),
        submitted(client, after),
    )
    with pytest.raises(InvalidRequest, match=r"Ask of 5 images 4, 0 captions.*lost 4 times, at 2 while computed alone"):
        killer.result()
    check(before, first)
    check(after, last)


def test_a_dead_clients_requests_leave_the_queue(pair: list[Any]) -> None:
    worker: Any = ray.remote(num_cpus=0)(Asker)
    os.kill(ray.get(worker.remote(PoolClient(pair, LIMITS)).ask.remote(asks(6, 0.1))), signal.SIGKILL)
    end = time.monotonic() + 30
    while any(member["queue_depth"] for member in statistics(pair)):
        assert time.monotonic() < end
        time.sleep(0.05)
    asked = asks(30)
    check(asked, submitted(PoolClient(pair, LIMITS), asked))


def test_members_that_are_gone_for_good_are_named_as_such() -> None:
    started = members(Doubler, 2, LIMITS, num_cpus=0)
    client = PoolClient(started, LIMITS)
    statistics(started)
    pending = submitted(client, asks(4, 0.5))
    for member in started:
        ray.kill(member)
    for reply in pending:
        with pytest.raises(Unavailable, match=r"no more: .*ray\.kill"):
            reply.result()
    with pytest.raises(Unavailable, match="no more"):
        submitted(client, asks(1))[0].result()
    broken = PoolClient(members(_unloadable, 1, LIMITS, num_cpus=0), LIMITS)
    with pytest.raises(Unavailable, match="no such teacher"):
        submitted(broken, asks(1))[0].result()


def _unloadable(device: str) -> Any:
    raise FileNotFoundError("no such teacher")


def denoise(seed: int, rows: int, **changes: Any) -> Denoise:
    rng = np.random.default_rng(seed)
    noisy_BCHW = rng.standard_normal((rows, 8, 4, 4)).astype(np.float16)
    return Denoise(noisy_BCHW, rng.integers(1000, size=rows), [f"caption {seed}"] * rows, **changes)


def test_real_requests_of_several_workers_share_forwards_and_get_their_own_replies(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    pool, teacher = TeacherPool(TeacherSpec(str(folder)), 1, limits=LIMITS), Teacher(folder)
    clients, noise_BCHW = [pool.client() for _ in range(3)], np.zeros((1, 8, 4, 4), np.float16)
    held = clients[0].submit(Sample(noise_BCHW, ["a"], 60, 1.0))
    asked = [denoise(i, 1 + i % 3, feature_names=("up_blocks.0",) if i % 2 else ()) for i in range(6)]
    pending = [clients[i % 3].submit(request) for i, request in enumerate(asked)]
    expected: list[list[Array]] = [teacher.answer(request) for request in asked]
    for parts, reply in zip(expected, pending, strict=True):
        for got, alone in zip(reply.result(), parts, strict=True):
            np.testing.assert_allclose(got, alone, atol=4e-3)
    held.result()
    [after] = pool.statistics()
    pool.close()
    assert after["answered"] == 7 and after["forwards"] < 7 and after["images"] == 13
    assert clients[1].statistics()["bytes_received"] == sum(part.nbytes for parts in expected[1::3] for part in parts)


def test_a_pool_of_impossible_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"teacher gpus: got 1.5"):
        TeacherPool(TeacherSpec(str(tmp_path)), 1, Share(gpus=1.5))
    with pytest.raises(InvalidRequest, match="teachers: got 0"):
        TeacherPool(TeacherSpec(str(tmp_path)), 0)
