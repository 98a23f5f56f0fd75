"""The cluster model in the limits where the answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sdxs.errors import InvalidRequest
from trainer.pool.cluster_model import Cluster, Device, Load, Network, all_reduce, best, micro_batch, predict

IDEAL = Network(objects=math.inf, gradients=math.inf, round_trip=0.0)
EVEN = Device(flops=1e12, memory=math.inf, utilisation=0.5, half_batch=0.0, reserved=0.0)
AHEAD = Load(
    worker_flops=3e9, teacher_flops=1e9, overlap=0.5, bytes=1e6, state_bytes=10e9, activation_bytes=1e9, teacher_bytes=2e9,
    teacher_activation_bytes=0.0, gradient_bytes=1e9, images=1024, depth=100,
)  # fmt: skip
ROOMY = replace(EVEN, memory=1e15)


@pytest.mark.parametrize("devices", [8, 32, 256])
def test_without_overheads_a_pool_of_the_teachers_share_and_teachers_in_the_workers_tie(devices: int) -> None:
    cluster = Cluster(ROOMY, devices, IDEAL, max_batch=10**9)
    inside, pooled = predict(cluster, AHEAD, 0), best(cluster, AHEAD)
    assert pooled.pool == devices // 4, "the teacher has a quarter of the FLOPs"
    assert inside.images_per_s == pytest.approx(devices * 0.5e12 / 4e9)
    assert pooled.images_per_s == pytest.approx(inside.images_per_s, rel=1e-3)
    assert pooled.waiting == pytest.approx(0, abs=1e-3)


def test_no_pool_is_a_teacher_in_every_worker_one_after_the_other() -> None:
    device = replace(EVEN, memory=15e9)
    found = predict(Cluster(device, 8, IDEAL), AHEAD, 0)
    assert found.batch <= 3 and found.teacher_batch == found.batch and found.waiting == 0
    assert found.images_per_s == pytest.approx(8 / (4e9 / 0.5e12))


def test_too_few_teachers_set_the_pace() -> None:
    found = predict(Cluster(ROOMY, 8, IDEAL, max_batch=10**9), AHEAD, 1)
    assert found.images_per_s == pytest.approx(0.5e12 / 1e9), "one member's own speed"
    assert found.waiting == pytest.approx(1 - (500 / 7) / (0.5e12 / 3e9))


def test_what_depends_on_its_own_sample_waits_for_the_whole_way() -> None:
    """Seven workers of one teacher, all asking at once: the worker's dependent half and the teacher's answers follow each other."""
    found = predict(Cluster(ROOMY, 8, IDEAL, max_batch=10**9), replace(AHEAD, depth=0, overlap=0.5, worker_flops=30e9), 1)
    batch = 1024 / 7
    own, answers = 30e9 * batch / 0.5e12, 1e9 * 1024 / 0.5e12
    assert found.images_per_s == pytest.approx(1024 / max(own, 0.5 * own + answers))


def test_the_wire_decides_when_it_is_slow() -> None:
    slow = replace(IDEAL, objects=1e6)
    found = predict(Cluster(ROOMY, 8, slow), AHEAD, 4)
    assert found.images_per_s == pytest.approx(4 * 1e6 / 1e6), "one image a second for each of four workers"
    assert found.waiting > 0.99
    assert predict(Cluster(ROOMY, 8, slow), AHEAD, 0) == predict(Cluster(ROOMY, 8, IDEAL), AHEAD, 0)


def test_memory_decides_the_micro_batch_and_whether_a_plan_fits() -> None:
    device = replace(EVEN, memory=15e9, reserved=1e9)
    assert micro_batch(device, AHEAD, with_teacher=False) == 4
    assert micro_batch(device, AHEAD, with_teacher=True) == 2
    assert micro_batch(device, replace(AHEAD, teacher_activation_bytes=1e9), with_teacher=True) == 1
    tight = replace(device, memory=12e9, half_batch=4.0)
    assert predict(Cluster(tight, 8, IDEAL), AHEAD, 0).images_per_s == 0
    assert best(Cluster(tight, 8, IDEAL), AHEAD).images_per_s > 0


def test_small_batches_are_slow_and_joining_makes_up_for_it() -> None:
    device = replace(EVEN, memory=13e9, half_batch=4.0)
    joined, alone = (best(Cluster(device, 16, IDEAL, max_batch=size), AHEAD) for size in (64, 1))
    assert joined.teacher_batch > alone.teacher_batch and joined.images_per_s > alone.images_per_s
    assert device.seconds(1e9, 4) == pytest.approx(2 * replace(device, half_batch=0.0).seconds(1e9, 4))


def test_a_teacher_on_other_devices_can_be_slower() -> None:
    cluster = Cluster(ROOMY, 8, IDEAL, max_batch=10**9)
    slower = replace(cluster, teacher_device=replace(ROOMY, flops=0.5e12))
    assert predict(slower, AHEAD, 1).images_per_s == pytest.approx(predict(cluster, AHEAD, 1).images_per_s / 2)
    assert predict(slower, AHEAD, 0) == predict(cluster, AHEAD, 0)


def test_more_teachers_than_workers_make_no_single_answer_faster() -> None:
    """Two workers: with two teachers or six, a request is answered by one of them."""
    found = [predict(Cluster(ROOMY, 2 + pool, IDEAL), replace(AHEAD, depth=0, overlap=0.0), pool) for pool in (2, 6)]
    assert found[0].images_per_s == found[1].images_per_s == pytest.approx(2 / (4e9 / 0.5e12))


def test_a_ring_moves_nothing_alone_and_twice_the_bytes_at_many() -> None:
    assert all_reduce(8e9, 1, 1e9) == 0
    assert all_reduce(8e9, 2, 1e9) == pytest.approx(8)
    assert all_reduce(8e9, 10**6, 1e9) == pytest.approx(16, rel=1e-5)


def test_a_pool_of_everything_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="pool: got 8"):
        predict(Cluster(ROOMY, 8), AHEAD, 8)
