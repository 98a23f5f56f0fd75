"""Batches: many requests as one job, on a real Redis-compatible server."""

import asyncio
from pathlib import Path

from sdxs.errors import InvalidRequest, Overloaded, Unavailable
from sdxs.store import FileStore
from sdxs.v1 import gateway_pb2
from services.fabric.dead_jobs import find_dead, replay
from services.fabric.deadline import Deadline
from services.fabric.jobs import JobQueue
from tests.jobs import PNG, REQUEST, Working, asking, ended, fall_silent, generated, settings, take

CANCELLED, SUCCEEDED, FAILED, RUNNING = (
    gateway_pb2.JOB_STATE_CANCELLED,
    gateway_pb2.JOB_STATE_SUCCEEDED,
    gateway_pb2.JOB_STATE_FAILED,
    gateway_pb2.JOB_STATE_RUNNING,
)


class Failing:
    """Generates, but for prompts that fail; knows what it was asked for."""

    def __init__(self, fails: dict[str, Exception] | None = None) -> None:
        self.fails = fails or {}
        self.calls: list[str] = []

    async def __call__(self, payload: bytes, deadline: Deadline) -> bytes:
        prompt = gateway_pb2.GenerateRequest.FromString(payload).prompt
        self.calls.append(prompt)
        if prompt in self.fails:
            raise self.fails[prompt]
        return await generated(payload, deadline)


async def test_each_request_of_a_batch_becomes_an_item(queue: JobQueue, tmp_path: Path) -> None:
    await queue.submit("batch", b"", asking("a", "b", "c"))
    waiting = await queue.get("batch")
    assert [item.state for item in waiting.items] == 3 * [gateway_pb2.JOB_STATE_QUEUED]
    async with Working(queue, tmp_path):
        job = await ended(queue, "batch")
    assert (job.state, job.progress.done, job.progress.total, job.progress.failed) == (SUCCEEDED, 3, 3, 0)
    for index, (item, prompt) in enumerate(zip(job.items, "abc", strict=True)):
        assert (item.state, item.receipt.seeds) == (SUCCEEDED, [1])
        assert [image.key for image in item.images] == [f"results/batch/{index}/0.png"]
        assert FileStore(tmp_path).get_bytes(item.images[0].key) == PNG + prompt.encode()
    assert not job.images and not job.HasField("receipt")
    short = await queue.get("batch", whole=False)
    assert (short.progress, len(short.items)) == (job.progress, 0)


async def test_a_batch_of_one_is_a_batch(queue: JobQueue, tmp_path: Path) -> None:
    order = gateway_pb2.SubmitJobRequest(requests=[gateway_pb2.GenerateRequest(prompt="a", seed=1)])
    await queue.submit("batch", b"", order)
    async with Working(queue, tmp_path):
        job = await ended(queue, "batch")
    assert ([image.key for image in job.items[0].images], len(job.images)) == (["results/batch/0/0.png"], 0)


async def test_one_refused_item_does_not_stop_the_others(queue: JobQueue, tmp_path: Path) -> None:
    failing = Failing({"b": InvalidRequest("prompt", "b", "something else")})
    await queue.submit("batch", b"", asking("a", "b", "c"))
    async with Working(queue, tmp_path, failing):
        job = await ended(queue, "batch")
    assert (job.state, job.progress.done, job.progress.failed, job.deliveries) == (SUCCEEDED, 3, 1, 1)
    assert [item.state for item in job.items] == [SUCCEEDED, FAILED, SUCCEEDED]
    error = job.items[1].error
    assert (error.code, error.field) == ("INVALID_ARGUMENT", "requests[1].prompt")
    assert sorted(failing.calls) == ["a", "b", "c"]


async def test_a_batch_of_which_all_is_refused_fails(queue: JobQueue, tmp_path: Path) -> None:
    failing = Failing({prompt: InvalidRequest("prompt", prompt, "something else") for prompt in "ab"})
    await queue.submit("batch", b"", asking("a", "b"))
    async with Working(queue, tmp_path, failing):
        job = await ended(queue, "batch")
    assert (job.state, job.error.code, job.error.field) == (FAILED, "INVALID_ARGUMENT", "requests[0].prompt")
    assert job.progress.failed == 2


async def test_what_a_dead_worker_made_is_not_made_again(queue: JobQueue, tmp_path: Path) -> None:
    await queue.submit("batch", b"", asking("a", "b", "c"))
    dead = await take(queue, "dead")
    made = gateway_pb2.JobItem(state=SUCCEEDED, images=[gateway_pb2.JobImage(key="by the dead")])
    assert await queue.put_item(dead, 1, made)
    await fall_silent(queue, dead, "dead")
    working = Failing()
    async with Working(queue, tmp_path, working):
        job = await ended(queue, "batch")
    assert sorted(working.calls) == ["a", "c"]
    assert (job.state, job.items[1]) == (SUCCEEDED, made)
    assert not await queue.put_item(dead, 0, gateway_pb2.JobItem(state=FAILED)), "its worker comes too late"
    assert await queue.get("batch") == job


async def test_progress_starts_the_count_of_deliveries_anew(queue: JobQueue) -> None:
    """Each delivery that makes an item starts the count anew: a roll-out may stop a long batch more often than the limit says."""
    await queue.submit("batch", b"", asking(*"abcdef"))
    item = gateway_pb2.JobItem(state=SUCCEEDED)
    for index in range(5):
        delivery = await take(queue, "worker")
        assert (delivery.number, delivery.done) == (min(index + 1, 2), frozenset(range(index)))
        assert await queue.put_item(delivery, index, item)
        await fall_silent(queue, delivery, "worker")
    for number in (2, 3):
        delivery = await take(queue, "worker")
        assert delivery.number == number
        await fall_silent(queue, delivery, "worker")
    assert await queue.take("worker", wait_s=0.1) is None
    job = await queue.get("batch")
    assert (job.state, job.deliveries, job.progress.done) == (FAILED, 7, 5)


async def test_a_batch_is_cancelled_between_its_items(queue: JobQueue, tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def slow(payload: bytes, deadline: Deadline) -> bytes:
        if b"b" in payload:
            begun.set()
            await asyncio.sleep(1000)
        return await generated(payload, deadline)

    await queue.submit("batch", b"", asking("a", "b", "c"))
    async with Working(queue, tmp_path, slow, job_requests_at_once=1):
        await begun.wait()
        job = await queue.get("batch")
        assert (job.state, job.progress.done, [item.state for item in job.items]) == (RUNNING, 1, [SUCCEEDED, RUNNING, RUNNING])
        await queue.cancel("batch")
        await queue.submit("next", b"", REQUEST)
        assert (await ended(queue, "next")).state == SUCCEEDED
    job = await queue.get("batch")
    assert (job.state, [item.state for item in job.items]) == (CANCELLED, [SUCCEEDED, CANCELLED, CANCELLED])


async def test_a_full_gateway_is_asked_again_and_costs_no_delivery(queue: JobQueue, tmp_path: Path) -> None:
    calls: list[bytes] = []

    async def full(payload: bytes, deadline: Deadline) -> bytes:
        calls.append(payload)
        if len(calls) <= 5:
            raise Overloaded("full", retry_after_s=0.05)
        return await generated(payload, deadline)

    await queue.submit("patient", b"", REQUEST)
    async with Working(queue, tmp_path, full):
        job = await ended(queue, "patient")
    assert (job.state, job.deliveries, len(calls)) == (SUCCEEDED, 1, 6)


async def test_a_dying_batch_makes_all_it_can_and_a_replay_the_rest(queue: JobQueue, tmp_path: Path) -> None:
    queue.settings = settings(job_max_deliveries=2)
    failing = Failing({"b": Unavailable("not now")})
    await queue.submit("batch", b"", asking("a", "b", "c", "d"))
    async with Working(queue, tmp_path, failing):
        job = await ended(queue, "batch")
        assert (job.state, job.error.code, job.progress.done) == (FAILED, "ABORTED", 3)
        assert [len(item.images) for item in job.items] == [1, 0, 1, 1], "what was made is kept"
        assert "requests[1]: Unavailable" in job.error.message
        assert sorted(failing.calls) == ["a", "b", "b", "c", "d"], "and not made again"
        failing.fails.clear()
        await replay(queue, await find_dead(queue, "batch"))
        job = await ended(queue, "batch")
    assert (job.state, job.progress.done, job.progress.failed) == (SUCCEEDED, 4, 0)
    assert sorted(failing.calls) == ["a", "b", "b", "b", "c", "d"]
    assert [image.key for item in job.items for image in item.images] == [f"results/batch/{i}/0.png" for i in range(4)]
