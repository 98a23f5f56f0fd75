"""The job queue and the worker on a real Redis-compatible server."""

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sdxs.errors import AlreadyExists, InvalidRequest, NotFound, Overloaded, PreconditionFailed, Unavailable
from sdxs.store import FileStore
from sdxs.v1 import gateway_pb2
from services.fabric.deadline import Deadline
from services.fabric.jobs import GROUP, Delivery, JobQueue
from services.gateway.checks import UnknownModel
from services.worker.deployment import WorkerReplica
from tests.jobs import PNG, REQUEST, VISIBILITY_S, Working, asking, ended, generated, settings


async def test_a_job_becomes_an_object(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    assert await queue.submit("one", b"asked", REQUEST) == "JOB_STATE_QUEUED"
    assert (await queue.get("one")).state == gateway_pb2.JOB_STATE_QUEUED
    async with Working(queue, tmp_path):
        job = await ended(queue, "one")
    assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED
    assert [image.key for image in job.images] == ["results/one/0.png"]
    assert FileStore(tmp_path).get_bytes("results/one/0.png") == PNG + b"red apple"
    assert (job.deliveries, job.receipt.seeds, job.images[0].size) == (1, [1], len(PNG) + 9)
    assert job.created.ToNanoseconds() < job.finished.ToNanoseconds()
    assert await queue.backlog() == 0
    assert 0 < await redis.ttl("{sdxs}:job:one") <= 24 * 3600


async def test_the_same_id_is_the_same_job(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    states = await asyncio.gather(*(queue.submit("same", b"asked", REQUEST) for _ in range(20)))
    assert set(states) == {"JOB_STATE_QUEUED"}
    assert await queue.backlog() == 1
    with pytest.raises(AlreadyExists):
        await queue.submit("same", b"something else", REQUEST)
    async with Working(queue, tmp_path):
        await ended(queue, "same")
    assert await queue.submit("same", b"asked", REQUEST) == "JOB_STATE_SUCCEEDED"
    assert await queue.backlog() == 0


async def test_an_unknown_job_is_not_found(queue: JobQueue) -> None:
    with pytest.raises(NotFound):
        await queue.get("nobody")


async def test_a_full_queue_refuses(redis: "Redis") -> None:
    queue = JobQueue(redis, settings(max_queued_jobs=2))
    await queue.open()
    for name in ("a", "b"):
        await queue.submit(name, b"", REQUEST)
    with pytest.raises(Overloaded):
        await queue.submit("c", b"", REQUEST)


DYING_WORKER = """
import asyncio, sys
from services.fabric.jobs import open_queue
from services.gateway.checks import UnknownModel
from services.settings import ServingSettings
from services.worker.deployment import WorkerReplica
from services.worker.service import Worker

async def never(payload, deadline):
    print("begun", flush=True)
    await asyncio.sleep(1000)

settings = ServingSettings()
asyncio.run(Worker(open_queue(settings), lambda: None, never, settings).run())
"""


async def test_a_killed_workers_job_is_done_by_another(queue: JobQueue, redis_url: str, tmp_path: Path) -> None:
    await queue.submit("orphan", b"", REQUEST)
    environment = {**os.environ, "SDXS_REDIS_URL": redis_url, "SDXS_JOB_VISIBILITY_S": str(VISIBILITY_S)}
    pipe = asyncio.subprocess.PIPE
    dying = await asyncio.create_subprocess_exec(sys.executable, "-c", DYING_WORKER, env=environment, stdout=pipe)
    assert dying.stdout is not None
    try:
        async with asyncio.timeout(100):  # a cold disk
            assert await dying.stdout.readline() == b"begun\n"
        async with Working(queue, tmp_path):
            await asyncio.sleep(3 * VISIBILITY_S)  # its heartbeat keeps the job with it
            job = await queue.get("orphan")
            assert (job.state, job.deliveries) == (gateway_pb2.JOB_STATE_RUNNING, 1)
            dying.send_signal(signal.SIGKILL)
            job = await ended(queue, "orphan")
    finally:
        if dying.returncode is None:
            dying.kill()
        await dying.wait()
    assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED
    assert job.deliveries == 2


async def test_a_passing_failure_is_tried_again(queue: JobQueue, tmp_path: Path) -> None:
    tries: list[bytes] = []

    async def flaky(payload: bytes, deadline: Deadline) -> bytes:
        tries.append(payload)
        if len(tries) == 1:
            raise Unavailable("not now")
        return await generated(payload, deadline)

    await queue.submit("flaky", b"", REQUEST)
    async with Working(queue, tmp_path, flaky):
        job = await ended(queue, "flaky")
    assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED
    assert tries == 2 * [REQUEST.request.SerializeToString()]


async def test_a_job_that_always_fails_dies(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    tries: list[bytes] = []

    async def broken(payload: bytes, _: Deadline) -> bytes:
        tries.append(payload)
        raise RuntimeError("poison")

    await queue.submit("poison", b"", REQUEST)
    async with Working(queue, tmp_path, broken):
        job = await ended(queue, "poison")
    assert len(tries) == 3
    assert (job.state, job.error.code, job.deliveries) == (gateway_pb2.JOB_STATE_FAILED, "ABORTED", 3)
    assert "poison" in job.error.message
    dead: Any = await redis.xrange("{sdxs}:dead")
    assert [fields[b"job"] for _, fields in dead] == [b"poison"]
    assert await queue.backlog() == 0


async def test_a_job_that_kills_its_workers_dies(queue: JobQueue, redis: "Redis") -> None:
    """Workers that vanish without a word: each delivery counts, the one after the last buries."""
    await queue.submit("killer", b"", REQUEST)
    for number in range(1, 4):
        delivery = await queue.take(f"worker {number}", wait_s=0.1)
        assert delivery is not None
        assert delivery.number == number
        await asyncio.sleep(VISIBILITY_S + 0.1)
    assert await queue.take("worker 4", wait_s=0.1) is None
    job = await queue.get("killer")
    assert (job.state, job.deliveries) == (gateway_pb2.JOB_STATE_FAILED, 3)
    assert await redis.xlen("{sdxs}:dead") == 1


async def test_what_can_never_succeed_is_not_tried_again(queue: JobQueue, tmp_path: Path) -> None:
    async def strict(_: bytes, __: Deadline) -> bytes:
        raise InvalidRequest("prompt", "red apple", "something else")

    await queue.submit("bad", b"", REQUEST)
    async with Working(queue, tmp_path, strict):
        job = await ended(queue, "bad")
    assert (job.error.code, job.error.field, job.deliveries) == ("INVALID_ARGUMENT", "prompt", 1)


async def test_what_the_model_lacks_is_not_tried_again(queue: JobQueue, tmp_path: Path) -> None:
    async def lacking(_: bytes, __: Deadline) -> bytes:
        raise PreconditionFailed("this model has no image encoder")

    await queue.submit("lacking", b"", REQUEST)
    async with Working(queue, tmp_path, lacking):
        job = await ended(queue, "lacking")
    assert (job.error.code, job.error.message, job.deliveries) == ("FAILED_PRECONDITION", "this model has no image encoder", 1)


async def test_a_model_that_went_away_is_named(queue: JobQueue, tmp_path: Path) -> None:
    async def elsewhere(_: bytes, __: Deadline) -> bytes:
        raise UnknownModel("model 'old' is not served here; new is")

    await queue.submit("old", b"", REQUEST)
    async with Working(queue, tmp_path, elsewhere):
        job = await ended(queue, "old")
    assert (job.error.code, job.error.field, job.deliveries) == ("NOT_FOUND", "model", 1)


async def test_a_worker_that_lost_its_job_knows(queue: JobQueue) -> None:
    await queue.submit("contested", b"", REQUEST)
    first = await queue.take("first", wait_s=0.1)
    assert first is not None
    assert await queue.keep(first, "first")
    await asyncio.sleep(VISIBILITY_S + 0.1)
    second = await queue.take("second", wait_s=0.1)
    assert second is not None
    assert second.job_id == "contested"
    assert not await queue.keep(first, "first")
    assert await queue.keep(second, "second")


async def test_many_workers_do_each_job_once(redis: "Redis", tmp_path: Path) -> None:
    patient: dict[str, object] = {"job_visibility_s": 60}  # however slow this machine is, nobody is taken for dead
    queue = JobQueue(redis, settings(**patient))
    await queue.open()
    done: list[bytes] = []

    async def counted(payload: bytes, deadline: Deadline) -> bytes:
        done.append(payload)
        return await generated(payload, deadline)

    names = [uuid.uuid4().hex for _ in range(30)]
    for name in names:
        await queue.submit(name, b"", asking(name))
    async with contextlib.AsyncExitStack() as working:
        for _ in range(3):
            await working.enter_async_context(Working(queue, tmp_path, counted, **patient))
        for name in names:
            await ended(queue, name)
    assert len(done) == len(set(done)) == 30


async def test_a_redis_that_forgot_everything_is_no_end(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    async with Working(queue, tmp_path):
        await asyncio.sleep(0.2)
        await redis.flushall()
        await queue.submit("after", b"", REQUEST)
        assert (await ended(queue, "after")).state == gateway_pb2.JOB_STATE_SUCCEEDED
    assert [group["name"] for group in await redis.xinfo_groups("{sdxs}:jobs:normal")] == [GROUP.encode()]


class Blinking(JobQueue):
    """A queue whose first heartbeat does not get through."""

    heartbeats = 0

    async def keep(self, delivery: Delivery, consumer: str) -> bool:
        self.heartbeats += 1
        if self.heartbeats == 1:
            raise RedisError("a blip")
        return await super().keep(delivery, consumer)


async def test_one_lost_heartbeat_does_not_lose_the_job(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    async def slow(payload: bytes, deadline: Deadline) -> bytes:
        await asyncio.sleep(2 * VISIBILITY_S)
        return await generated(payload, deadline)

    blinking = Blinking(redis, settings())
    await queue.submit("slow", b"", REQUEST)
    async with Working(blinking, tmp_path, slow):
        while (await queue.get("slow")).state != gateway_pb2.JOB_STATE_RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        async with Working(queue, tmp_path):
            job = await ended(queue, "slow")
    assert (job.state, job.deliveries) == (gateway_pb2.JOB_STATE_SUCCEEDED, 1)
    assert blinking.heartbeats >= 3


@pytest.mark.parametrize("fields", [{"other": "x"}, {"job": "nobody"}, {"job": b"\xff\xfe"}])
async def test_a_broken_entry_is_dropped(
    queue: JobQueue, redis: "Redis", tmp_path: Path, fields: dict[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    entry: Any = await redis.xadd("{sdxs}:jobs:normal", fields)
    await queue.submit("after", b"", REQUEST)
    async with Working(queue, tmp_path):
        assert (await ended(queue, "after")).state == gateway_pb2.JOB_STATE_SUCCEEDED
    assert await queue.backlog() == 0
    assert f"entry {entry.decode()} of the queue is dropped" in caplog.text


async def test_the_first_end_of_a_job_stands(redis: "Redis") -> None:
    queue = JobQueue(redis, settings(job_max_deliveries=1))
    await queue.open()
    await queue.submit("late", b"", REQUEST)
    late = await queue.take("late", wait_s=0.1)
    assert late is not None
    await asyncio.sleep(VISIBILITY_S + 0.1)
    assert await queue.take("other", wait_s=0.1) is None, "buried: delivered once already"
    failed = await queue.get("late")
    assert failed.state == gateway_pb2.JOB_STATE_FAILED
    assert not await queue.succeed(late, gateway_pb2.GetJobResponse())
    assert await queue.get("late") == failed


async def test_a_forgotten_job_does_not_come_back_as_half_a_job(queue: JobQueue, redis: "Redis") -> None:
    await queue.submit("forgotten", b"", REQUEST)
    delivery = await queue.take("worker", wait_s=0.1)
    assert delivery is not None
    await redis.flushall()
    await queue.open()
    assert not await queue.succeed(delivery, gateway_pb2.GetJobResponse())
    await queue.retry(delivery, "worker", "why not")
    with pytest.raises(NotFound):
        await queue.get("forgotten")


async def test_a_worker_that_stops_leaves_the_group(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    async def consumers() -> list[bytes]:
        return [consumer["name"] for consumer in await redis.xinfo_consumers("{sdxs}:jobs:normal", GROUP)]

    await queue.submit("one", b"", REQUEST)
    async with Working(queue, tmp_path):
        await ended(queue, "one")
        assert len(await consumers()) == 1
    assert await consumers() == []
    await queue.submit("two", b"", REQUEST)
    assert await queue.take("busy", wait_s=0.1) is not None
    await queue.leave("busy")
    assert await consumers() == [b"busy"], "its job would be lost with it"


async def test_a_worker_tells_how_many_jobs_have_not_ended(queue: JobQueue, tmp_path: Path) -> None:
    replica: Any = SimpleNamespace(_queue=queue)
    for name in ("a", "b", "c"):
        await queue.submit(name, b"", REQUEST)
    await queue.take("worker", wait_s=0.1)
    assert await WorkerReplica.record_autoscaling_stats(replica) == {"queued": 3.0}
    async with Working(queue, tmp_path):
        for name in ("a", "b", "c"):
            await ended(queue, name)
    assert await WorkerReplica.record_autoscaling_stats(replica) == {"queued": 0.0}
