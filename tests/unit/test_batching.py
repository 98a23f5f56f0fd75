"""The member's batcher, on a device that can be held."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from sdxs.errors import Overloaded
from trainer.pool.batching import Batcher
from trainer.pool.joining import Array, images
from trainer.teacher import Decode, Sample


class Device:
    """Doubles latents; every forward waits for `release`; a latent of 13 is unlucky."""

    def __init__(self) -> None:
        self.release, self.begun = threading.Event(), threading.Event()
        self.batches: list[tuple[str, int]] = []

    def __call__(self, request: Any) -> list[Array]:
        self.batches.append((type(request).__name__, images(request)))
        self.begun.set()
        assert self.release.wait(10)
        rows: Array = request.latent_BCHW if isinstance(request, Decode) else request.noise_BCHW
        if (rows == 13).any():
            raise ValueError("unlucky")
        return [2 * rows]


class Watch:
    def __init__(self) -> None:
        self.depths: list[int] = []
        self.forwards: list[tuple[int, int]] = []

    def queue(self, depth: int) -> None:
        self.depths.append(depth)

    def forward(self, request: Any, requests: int, seconds: float) -> None:
        self.forwards.append((images(request), requests))


def latent(value: float, rows: int = 1) -> Decode:
    return Decode(np.full((rows, 2, 2, 2), value))


def noise(value: float) -> Sample:
    return Sample(np.full((1, 2, 2, 2), value), ["a"], 3, 1.0)


def held(device: Device, batcher: Batcher) -> None:
    """A first request that keeps the device busy."""
    batcher.submit(latent(0))
    assert device.begun.wait(10)


def test_takes_all_that_waits_and_fits_first_come_first_served() -> None:
    device = Device()
    batcher = Batcher(device, max_batch=4, max_queue=100)
    held(device, batcher)
    asked = [latent(1), noise(2), latent(3, rows=2), latent(4, rows=2), latent(5), noise(6)]
    replies = [batcher.submit(request) for request in asked]
    device.release.set()
    assert [float(reply.result(10)[0].flat[0]) for reply in replies] == [2, 4, 6, 8, 10, 12]
    assert [len(reply.result()[0]) for reply in replies] == [1, 1, 2, 2, 1, 1]
    assert device.batches == [("Decode", 1), ("Decode", 4), ("Sample", 2), ("Decode", 2)]
    batcher.close()


def test_a_request_larger_than_the_batch_and_one_that_is_announced_are_computed_alone() -> None:
    device = Device()
    batcher, announced = Batcher(device, max_batch=4, max_queue=100), list[int]()
    held(device, batcher)
    replies = [batcher.submit(latent(1, rows=9)), batcher.submit(latent(2))]
    replies.append(batcher.submit(latent(3), lambda: announced.append(len(device.batches))))
    replies.append(batcher.submit(latent(4)))
    device.release.set()
    assert [len(reply.result(10)[0]) for reply in replies] == [9, 1, 1, 1]
    assert [rows for _, rows in device.batches] == [1, 9, 2, 1]
    assert announced == [3], "before its own forward, after all others'"
    batcher.close()


def test_with_a_batch_of_one_nothing_is_joined() -> None:
    device = Device()
    batcher = Batcher(device, max_batch=1, max_queue=100)
    held(device, batcher)
    replies = [batcher.submit(latent(1, rows=3)) for _ in range(3)]
    device.release.set()
    assert [len(reply.result(10)[0]) for reply in replies] == [3, 3, 3]
    assert [rows for _, rows in device.batches] == [1, 3, 3, 3]
    batcher.close()


def test_a_failure_in_a_joined_forward_reaches_its_own_request_only() -> None:
    device = Device()
    batcher = Batcher(device, max_batch=8, max_queue=100)
    held(device, batcher)
    good, bad, other = (batcher.submit(latent(value)) for value in (1, 13, 2))
    device.release.set()
    with pytest.raises(ValueError, match="unlucky"):
        bad.result(10)
    assert (good.result(10)[0] == 2).all() and (other.result(10)[0] == 4).all()
    assert [rows for _, rows in device.batches] == [1, 3, 1, 1, 1]
    assert batcher.statistics()["failed"] == 1
    batcher.close()


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    device = Device()
    batcher = Batcher(device, max_batch=1, max_queue=2)
    held(device, batcher)
    waiting = [batcher.submit(latent(1)) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests wait"):
        batcher.submit(latent(2))
    assert batcher.statistics()["queue_depth"] == 2 and batcher.statistics()["refused"] == 1
    device.release.set()
    for reply in waiting:
        reply.result(10)
    assert (batcher.submit(latent(3)).result(10)[0] == 6).all()
    batcher.close()


def test_a_withdrawn_request_is_not_computed() -> None:
    device = Device()
    batcher = Batcher(device, max_batch=8, max_queue=100)
    held(device, batcher)
    leaving, staying = batcher.submit(latent(1)), batcher.submit(latent(2))
    leaving.cancel()
    device.release.set()
    staying.result(10)
    assert device.batches == [("Decode", 1), ("Decode", 1)]
    batcher.close()


def test_statistics_and_watcher_count_the_same() -> None:
    device, watch = Device(), Watch()
    batcher = Batcher(device, max_batch=8, max_queue=100, watcher=watch)
    held(device, batcher)
    replies = [batcher.submit(latent(1, rows=3)), batcher.submit(latent(2))]
    device.release.set()
    for reply in replies:
        reply.result(10)
    batcher.close()
    found = batcher.statistics()
    assert watch.forwards == [(1, 1), (4, 2)] and max(watch.depths) == 2 and watch.depths[-1] == 0
    assert (found["answered"], found["images"], found["forwards"], found["batch_images"]) == (3, 5, 2, 2.5)
    assert 0 < found["busy_share"] <= 1
    assert found["seconds_per_image"] * 5 == pytest.approx(found["busy_seconds"])


def test_closing_cancels_what_waits() -> None:
    device = Device()
    batcher = Batcher(device, max_batch=1, max_queue=100)
    held(device, batcher)
    waiting = batcher.submit(latent(1))
    batcher.close()
    assert waiting.cancelled()
    device.release.set()
