"""The queue's rules on a real Redis-compatible server: order, places in it, room, lists, cancelling, the dead."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from sdxs.errors import Overloaded, PreconditionFailed
from sdxs.v1 import gateway_pb2
from services.fabric.dead_jobs import dead_jobs, find_dead, replay
from services.fabric.deadline import Deadline
from services.fabric.jobs import JobQueue
from tests.jobs import HIGH, LOW, NORMAL, REQUEST, Working, asking, ended, fall_silent, generated, settings, take

CANCELLED, SUCCEEDED, FAILED = (
    gateway_pb2.JOB_STATE_CANCELLED,
    gateway_pb2.JOB_STATE_SUCCEEDED,
    gateway_pb2.JOB_STATE_FAILED,
)
EMPTY = gateway_pb2.GetJobResponse()


async def take_all(queue: JobQueue) -> list[str]:
    """Ids in the order they are given out, each one done at once."""
    taken = []
    while delivery := await queue.take("worker", wait_s=0):
        taken.append(delivery.job_id)
        assert await queue.succeed(delivery, EMPTY)
    return taken


async def test_higher_classes_first_and_none_starves(queue: JobQueue) -> None:
    for priority, letter in ((LOW, "l"), (NORMAL, "n"), (HIGH, "h")):
        for number in range(40):
            await queue.submit(f"{letter}{number:02}", b"", asking("a", priority=priority))
    taken = await take_all(queue)
    assert len(taken) == len(set(taken)) == 120
    assert taken[:3] == ["h00", "h01", "h02"]
    for start in range(0, 48, 16):
        classes = [name[0] for name in taken[start : start + 16]]
        assert [classes.count(letter) for letter in "hnl"] == [12, 3, 1]
    for letter in "hnl":
        assert [name for name in taken if name[0] == letter] == [f"{letter}{number:02}" for number in range(40)], "in order"


async def test_a_job_knows_its_place(queue: JobQueue) -> None:
    async def places(*names: str) -> list[int]:
        return [(await queue.get(name)).position for name in names]

    for name, priority in (("low", LOW), ("normal", 0), ("normal 2", NORMAL), ("high", HIGH)):
        await queue.submit(name, b"", asking("a", priority=priority))
    names = ("high", "normal", "normal 2", "low")
    assert await places(*names) == [1, 2, 3, 4]
    await take(queue)
    assert await places(*names) == [0, 1, 2, 3]
    await queue.cancel("normal")
    assert await places(*names) == [0, 0, 1, 2]
    await queue.submit("high 2", b"", asking("a", priority=HIGH))
    assert await places(*names, "high 2") == [0, 0, 2, 3, 1]
    assert [(await queue.get(name)).priority for name in names] == [HIGH, NORMAL, NORMAL, LOW]


async def test_lists_are_newest_first_page_by_page(queue: JobQueue) -> None:
    names = [f"job{number:03}" for number in range(250)]
    for name in names:
        await queue.submit(name, b"", REQUEST)
    done = [(await take(queue)).job_id for _ in range(5)]
    for name in done[:2]:
        await queue.cancel(name)
    found: list[str] = []
    before, pages = None, 0
    while pages == 0 or before is not None:
        jobs, before = await queue.list_jobs(frozenset(), before, 70)
        found += [job.job_id for job in jobs]
        pages += 1
        await queue.submit(f"later{pages}", b"", REQUEST)  # new jobs do not move the pages that follow
    assert (found, pages) == (names[::-1], 4)
    cancelled, before = await queue.list_jobs(frozenset([CANCELLED]), None, 10)
    assert ([job.job_id for job in cancelled], before) == (["job001", "job000"], None)
    assert (await queue.list_jobs(frozenset([SUCCEEDED]), None, 10))[0] == []


async def test_jobs_leave_the_list_with_their_time(redis: "Redis") -> None:
    queue = JobQueue(redis, settings(job_ttl_s=1))
    await queue.open()
    await queue.submit("old", b"", REQUEST)
    await queue.succeed(await take(queue), EMPTY)
    await asyncio.sleep(1.2)
    assert await queue.list_jobs(frozenset(), None, 10) == ([], None)
    assert await queue.submit("old", b"something else", REQUEST) == "JOB_STATE_QUEUED"
    await queue.submit("new", b"", REQUEST)
    jobs, _ = await queue.list_jobs(frozenset(), None, 10)
    assert [job.job_id for job in jobs] == ["new", "old"]
    assert await redis.zcard("{sdxs}:expiring") == 0


async def test_no_more_jobs_than_there_is_room_for(redis: "Redis") -> None:
    """Sixty callers at once, through six connections, for ten places in three classes."""
    queues = [JobQueue(redis, settings(max_queued_jobs=10, job_retry_after_s=7)) for _ in range(6)]
    await queues[0].open()
    asks = [queues[i % 6].submit(str(i), b"", asking("a", priority=1 + i % 3)) for i in range(60)]
    answers = await asyncio.gather(*asks, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Overloaded)]
    assert (answers.count("JOB_STATE_QUEUED"), len(refused)) == (10, 50)
    assert {error.retry_after_s for error in refused} == {7}
    assert await queues[0].backlog() == 10
    accepted = [str(i) for i, answer in enumerate(answers) if answer == "JOB_STATE_QUEUED"]
    assert await queues[0].submit(accepted[0], b"", REQUEST) == "JOB_STATE_QUEUED", "it is there already"
    assert sorted(await take_all(queues[0])) == sorted(accepted)


async def test_no_more_bytes_than_there_is_room_for(redis: "Redis") -> None:
    queue = JobQueue(redis, settings(max_queued_bytes=10_000))
    await queue.open()
    large = asking("a" * 4000)
    await queue.submit("one", b"", large)
    await queue.submit("two", b"", large)
    with pytest.raises(Overloaded, match="10000 bytes"):
        await queue.submit("three", b"", large)
    await queue.succeed(await take(queue), EMPTY)
    await queue.submit("three", b"", large)
    await queue.cancel("three")
    await queue.cancel("two")
    assert await redis.hget("{sdxs}:counters", "bytes") == b"0"
    assert await redis.hget("{sdxs}:job:one", "request") is None, "nobody needs it any more"


async def test_a_cancelled_job_never_begins(queue: JobQueue) -> None:
    await queue.submit("one", b"", REQUEST)
    await queue.submit("two", b"", REQUEST)
    await queue.cancel("one")
    job = await queue.get("one")
    assert (job.state, job.deliveries, job.HasField("finished")) == (CANCELLED, 0, True)
    assert await take_all(queue) == ["two"]
    for name in ("one", "two"):
        with pytest.raises(PreconditionFailed, match="CANCELLED" if name == "one" else "SUCCEEDED"):
            await queue.cancel(name)


async def test_the_worker_drops_a_job_that_is_cancelled(queue: JobQueue, tmp_path: Path) -> None:
    dropped = asyncio.Event()

    async def endless(payload: bytes, deadline: Deadline) -> bytes:
        if b"endless" not in payload:
            return await generated(payload, deadline)
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            dropped.set()
            raise
        raise AssertionError

    await queue.submit("one", b"", asking("endless"))
    await queue.submit("two", b"", REQUEST)
    async with Working(queue, tmp_path, endless):
        while (await queue.get("one")).state != gateway_pb2.JOB_STATE_RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await queue.cancel("one")
        assert (await queue.get("one")).state == CANCELLED
        async with asyncio.timeout(5):
            await dropped.wait()
        assert (await ended(queue, "two")).state == SUCCEEDED, "the worker goes on"
    assert (await queue.get("one")).state == CANCELLED


async def test_of_cancel_and_success_the_first_stands(queue: JobQueue) -> None:
    ends = set()
    for number in range(40):
        name = str(number)
        await queue.submit(name, b"", REQUEST)
        delivery = await take(queue)
        both = (queue.cancel(name), queue.succeed(delivery, EMPTY))
        order = both if number % 2 else both[::-1]
        answers = await asyncio.gather(*order, return_exceptions=True)
        cancelled, succeeded = answers if number % 2 else answers[::-1]
        state = (await queue.get(name)).state
        assert (cancelled is None, succeeded) == (state == CANCELLED, state == SUCCEEDED)
        ends.add(state)
    assert ends == {CANCELLED, SUCCEEDED}
    assert await queue.backlog() == 0


async def test_silent_workers_are_found_behind_many_lively_ones(redis: "Redis") -> None:
    """XAUTOCLAIM looks at ten pending entries a call: the one to claim may be the twenty-first."""
    queue = JobQueue(redis, settings(job_visibility_s=60))
    await queue.open()
    for number in range(21):
        await queue.submit(str(number), b"", REQUEST)
    deliveries = [await take(queue, f"worker {number}") for number in range(21)]
    last = deliveries[-1]
    await fall_silent(queue, last, "worker 20")
    again = await JobQueue(redis, settings(job_visibility_s=60)).take("another", wait_s=0)
    assert again is not None
    assert (again.job_id, again.number) == ("20", 2)


async def test_a_dead_job_is_replayed(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    for name in ("one", "two"):
        await queue.submit(name, b"", REQUEST)
        assert await queue.bury(await take(queue), f"poison {name}")
    assert [(dead.job_id, "poison two" in dead.why) async for dead in dead_jobs(queue)] == [("two", True), ("one", False)]
    assert [dead.job_id async for dead in dead_jobs(queue, 1)] == ["two"]
    dead = await find_dead(queue, "one")
    await replay(queue, dead)
    job = await queue.get("one")
    assert (job.state, job.position, job.deliveries) == (gateway_pb2.JOB_STATE_QUEUED, 1, 1)
    assert not job.HasField("error") and not job.HasField("finished")
    assert await redis.ttl("{sdxs}:job:one") == -1, "it does not expire while it waits"
    with pytest.raises(PreconditionFailed):
        await replay(queue, dead)
    async with Working(queue, tmp_path):
        job = await ended(queue, "one")
    assert (job.state, job.deliveries) == (SUCCEEDED, 2)
    assert [dead.job_id async for dead in dead_jobs(queue)] == ["two"]
    assert (await queue.get("two")).state == FAILED


async def test_a_dead_job_is_remembered_for_longer(queue: JobQueue, redis: "Redis") -> None:
    await queue.submit("dead", b"", REQUEST)
    await queue.bury(await take(queue), "poison")
    await queue.submit("refused", b"", REQUEST)
    await queue.refuse(await take(queue), gateway_pb2.JobError(code="INVALID_ARGUMENT"))
    assert 6 * 24 * 3600 < await redis.ttl("{sdxs}:job:dead") <= 7 * 24 * 3600
    assert 23 * 3600 < await redis.ttl("{sdxs}:job:refused") <= 24 * 3600


async def test_a_replay_needs_room(redis: "Redis") -> None:
    queue = JobQueue(redis, settings(max_queued_jobs=1))
    await queue.open()
    await queue.submit("dead", b"", REQUEST)
    await queue.bury(await take(queue), "poison")
    await queue.submit("waits", b"", REQUEST)
    with pytest.raises(Overloaded):
        await replay(queue, await find_dead(queue, "dead"))
    await queue.cancel("waits")
    await replay(queue, await find_dead(queue, "dead"))


async def test_all_keys_of_a_queue_share_a_slot(queue: JobQueue, redis: "Redis") -> None:
    await queue.submit("one", b"", asking("a", "b", webhook_url="https://example.org"))
    delivery = await take(queue)
    await queue.put_item(delivery, 0, gateway_pb2.JobItem())
    await queue.bury(delivery, "poison")
    names: Any = await redis.keys("*")
    assert {b"{sdxs}:dead", b"{sdxs}:webhooks", b"{sdxs}:job:one:items"} <= set(names)
    assert all(name.startswith(b"{sdxs}:") for name in names)
