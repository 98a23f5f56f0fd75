"""The greedy batcher, on a device that can be held."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from sdxs.errors import DeadlineExceeded, Overloaded
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline, Priority


class Device:
    """Doubles numbers; holds the first batch until released."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.release.wait(10)
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]


async def held(device: Device, batcher: GreedyBatcher[int, int]) -> "asyncio.Task[object]":
    """A first item that keeps the device busy."""
    first = asyncio.create_task(batcher.submit([0]))
    while not device.batches:  # noqa: ASYNC110 - set by the device's thread
        await asyncio.sleep(0.001)
    return first


async def test_takes_all_that_waits_and_waits_for_nobody() -> None:
    device = Device()
    batcher = GreedyBatcher(device, max_batch=4, max_waiting=100)
    first = await held(device, batcher)
    waiting = [asyncio.create_task(batcher.submit([number])) for number in range(1, 7)]
    await asyncio.sleep(0)
    device.release.set()
    results = [(await task)[0] for task in waiting]
    await first
    assert [done.result for done in results] == [2, 4, 6, 8, 10, 12]
    assert [done.batch for done in results] == [4, 4, 4, 4, 2, 2]
    assert device.batches == [[0], [1, 2, 3, 4], [5, 6]]
    batcher.close()


async def test_tells_how_long_an_item_waited_and_how_long_its_batch_took() -> None:
    device, clock = Device(), asyncio.get_running_loop()
    batcher = GreedyBatcher(device, max_batch=4, max_waiting=100)
    began = clock.time()
    first: Any = await held(device, batcher)
    second = asyncio.create_task(batcher.submit([1, 2]))
    await asyncio.sleep(0.05)
    device.release.set()
    [alone], pair = await first, await second
    whole = clock.time() - began
    assert alone.queue_s < alone.compute_s and 0.05 <= alone.compute_s <= whole
    for done in pair:
        assert 0.05 <= done.queue_s <= whole and done.compute_s <= whole - done.queue_s
    batcher.close()


async def test_an_item_that_asks_for_it_is_alone() -> None:
    device = Device()
    batcher = GreedyBatcher(device, max_batch=4, max_waiting=100)
    first = await held(device, batcher)
    waiting = [asyncio.create_task(batcher.submit([number], alone=number in (2, 3))) for number in (1, 2, 3, 4, 5)]
    await asyncio.sleep(0)
    device.release.set()
    await asyncio.gather(first, *waiting)
    assert device.batches == [[0], [1, 4, 5], [2], [3]]
    batcher.close()


async def test_a_cancelled_caller_takes_its_items_with_it() -> None:
    device = Device()
    batcher = GreedyBatcher(device, max_batch=4, max_waiting=100)
    first = await held(device, batcher)
    leaving = asyncio.create_task(batcher.submit([1, 2]))
    staying = asyncio.create_task(batcher.submit([3]))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    device.release.set()
    await asyncio.gather(first, staying)
    assert device.batches == [[0], [3]]
    batcher.close()


async def test_what_has_run_out_of_time_is_never_begun() -> None:
    device = Device()
    batcher = GreedyBatcher(device, max_batch=4, max_waiting=100)
    first = await held(device, batcher)
    late = asyncio.create_task(batcher.submit([1], deadline=Deadline.after(0.02)))
    staying = asyncio.create_task(batcher.submit([2], deadline=Deadline.after(30)))
    await asyncio.sleep(0.05)
    device.release.set()
    with pytest.raises(DeadlineExceeded, match="before the work began"):
        await late
    await asyncio.gather(first, staying)
    assert device.batches == [[0], [2]]
    batcher.close()


async def test_tenants_take_turns_and_the_urgent_goes_first() -> None:
    device = Device()
    batcher = GreedyBatcher(device, max_batch=2, max_waiting=100)
    first = await held(device, batcher)
    flood = asyncio.create_task(batcher.submit([1, 2, 3, 4], deadline=Deadline(tenant="a")))
    await asyncio.sleep(0)
    little = asyncio.create_task(batcher.submit([5], deadline=Deadline(tenant="b")))
    urgent = asyncio.create_task(batcher.submit([6], deadline=Deadline(priority=Priority.HIGH, tenant="a")))
    await asyncio.sleep(0)
    device.release.set()
    await asyncio.gather(first, flood, little, urgent)
    assert device.batches == [[0], [1, 6], [5, 2], [3, 4]]
    batcher.close()


async def test_a_failure_reaches_its_callers_and_nobody_else() -> None:
    device = Device()
    device.release.set()
    batcher = GreedyBatcher(device, max_batch=1, max_waiting=100)
    with pytest.raises(ValueError, match="unlucky"):
        await batcher.submit([13])
    assert (await batcher.submit([4]))[0].result == 8
    batcher.close()


async def test_a_full_queue_refuses() -> None:
    device = Device()
    batcher = GreedyBatcher(device, max_batch=1, max_waiting=2)
    first = await held(device, batcher)
    waiting = asyncio.create_task(batcher.submit([1, 2]))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await batcher.submit([3])
    device.release.set()
    await asyncio.gather(first, waiting)
    batcher.close()


async def test_a_batch_is_of_one_bucket_and_filled_past_others() -> None:
    """Whoever is next begins it; those of its bucket join in their order; one that is alone is passed too, and is not forgotten."""
    device = Device()
    batcher = GreedyBatcher(device, max_batch=3, max_waiting=100, bucket=lambda item: item % 2)
    first = await held(device, batcher)
    others = [asyncio.create_task(batcher.submit([item], alone=item == 4)) for item in (1, 2, 4, 3, 6, 5, 7, 8)]
    await asyncio.sleep(0)
    device.release.set()
    await asyncio.gather(first, *others)
    assert device.batches == [[0], [1, 3, 5], [2, 6, 8], [4], [7]]


async def test_buckets_that_wait_take_turns_however_full_one_is() -> None:
    device = Device()
    batcher = GreedyBatcher(device, max_batch=2, max_waiting=100, bucket=lambda item: item % 2)
    first = await held(device, batcher)
    crowd = asyncio.create_task(batcher.submit([2, 4, 6, 8, 1, 10, 12]))
    await asyncio.sleep(0)
    device.release.set()
    await asyncio.gather(first, crowd)
    assert device.batches == [[0], [2, 4], [6, 8], [1], [10, 12]]
