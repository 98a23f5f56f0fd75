"""Jobs over gRPC: the gateway's desk on a real Redis-compatible server, asked by the clients and the command line."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from redis.asyncio import Redis
from typer.testing import CliRunner

from sdxs.client import AsyncClient, Client, Job
from sdxs.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    PreconditionFailed,
    SdxsError,
    Unavailable,
)
from sdxs.store import FileStore
from sdxs.v1 import gateway_pb2
from services.fabric.deadline import Deadline
from services.fabric.endpoint import Endpoint
from services.fabric.jobs import JobQueue
from services.fabric.server import DataPlane
from services.gateway.desk import JobDesk
from services.gateway.inputs import Inputs
from services.gateway.service import DESCRIPTOR, GatewayService
from services.jobs_cli import app
from tests.jobs import REQUEST, Working, gateway, generated, settings, take
from tests.serving import INVALID, Refusal, refusal
from tests.tables import table_of

QUEUED, RUNNING, SUCCEEDED, CANCELLED = "QUEUED", "RUNNING", "SUCCEEDED", "CANCELLED"


def state(job: Job) -> str:
    return gateway_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")


@pytest.fixture
async def address(queue: JobQueue, tmp_path: Path) -> AsyncIterator[str]:
    async with gateway(queue, tmp_path) as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address) as client:
        yield client


async def test_a_watcher_sees_every_change_and_the_end(client: AsyncClient, queue: JobQueue, tmp_path: Path) -> None:
    steps = {prompt: asyncio.Event() for prompt in ("first", "a", "b")}

    async def stepwise(payload: bytes, deadline: Deadline) -> bytes:
        await steps[gateway_pb2.GenerateRequest.FromString(payload).prompt].wait()
        return await generated(payload, deadline)

    await client.submit_job("first")
    watched = await client.submit_batch(["a", "b"])
    seen = []
    async with asyncio.timeout(30), Working(queue, tmp_path, stepwise, job_requests_at_once=1):
        async for job in client.watch_job(watched):
            seen.append((state(job), job.position, job.progress.done))
            for prompt, when in (("first", (QUEUED, 1, 0)), ("a", (RUNNING, 0, 0)), ("b", (RUNNING, 0, 1))):
                if seen[-1] == when:
                    steps[prompt].set()
    passing = [(QUEUED, 2, 0), (RUNNING, 0, 2)]  # until the worker takes the first job, and between last item and end
    assert [step for step in seen if step not in passing] == [
        (QUEUED, 1, 0),
        (RUNNING, 0, 0),
        (RUNNING, 0, 1),
        (SUCCEEDED, 0, 2),
    ]
    assert [len(item.images) for item in job.items] == [1, 1]
    assert job.items[0].images[0].url.startswith("file://")


async def test_a_watcher_hears_at_once(client: AsyncClient, queue: JobQueue) -> None:
    """Changes are told, not only found by looking now and then: many in less time than looks take."""
    job_id = await client.submit_batch(["a"] * 20)
    delivery = await take(queue)
    watching: Any = client.watch_job(job_id)
    await anext(watching)
    await asyncio.sleep(0.3)  # the subscription
    loop = asyncio.get_running_loop()
    began = loop.time()
    for index in range(10):
        await queue.put_item(delivery, index, gateway_pb2.JobItem(state=gateway_pb2.JOB_STATE_SUCCEEDED))
        while (await anext(watching)).progress.done <= index:
            pass
    assert loop.time() - began < 5, "ten looks take ten seconds"
    await watching.aclose()


async def test_a_watcher_survives_a_broken_subscription(client: AsyncClient, queue: JobQueue, redis: "Redis") -> None:
    job_id = await client.submit_job("a")
    watching = client.watch_job(job_id)
    assert state(await anext(watching)) == QUEUED
    await redis.client_kill_filter(_type="pubsub")
    async with asyncio.timeout(10):
        delivery = await take(queue)
        assert state(await anext(watching)) == RUNNING
        await queue.succeed(delivery, gateway_pb2.GetJobResponse())
        assert [state(job) async for job in watching] == [SUCCEEDED]


async def test_a_watcher_that_leaves_is_forgotten(queue: JobQueue, redis: "Redis", tmp_path: Path) -> None:
    async with gateway(queue, tmp_path, max_streams=1) as address, AsyncClient(address) as client:
        job_id = await client.submit_job("a")
        first: Any = client.watch_job(job_id)
        await anext(first)
        with pytest.raises(Overloaded) as caught:
            await anext(client.watch_job(job_id))
        assert caught.value.retry_after_s == 0.5
        await first.aclose()
        await asyncio.sleep(0.3)  # the server hears of it
        with pytest.raises(DeadlineExceeded):
            _ = [job async for job in client.watch_job(job_id, timeout=0.5)]
        async with asyncio.timeout(5):
            while await redis.pubsub_numpat():  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_a_server_that_stops_does_not_wait_for_watchers(queue: JobQueue, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    desk = JobDesk(queue, lambda: FileStore(tmp_path), 60)
    inputs = Inputs(lambda: FileStore(tmp_path), queue.settings)
    service = GatewayService(table_of(), desk, inputs, queue.settings)
    plane = DataPlane(Endpoint(DESCRIPTOR, service, 8, 8), 1 << 20)
    await plane.start("127.0.0.1:0")
    await queue.submit("one", b"", REQUEST)
    async with AsyncClient(plane.address) as client:
        watching: Any = client.watch_job("one")
        await anext(watching)
        began = loop.time()
        stopping = asyncio.create_task(plane.drain(30))
        with pytest.raises(Unavailable) as caught:
            await anext(watching)
        await stopping
    assert loop.time() - began < 15, "drains for 30 seconds otherwise"
    assert caught.value.retry_after_s == 1.0


async def test_jobs_are_listed_and_cancelled(client: AsyncClient) -> None:
    names = [await client.submit_job("a", priority=priority) for priority in ("low", "normal", "high")]
    assert [(await client.get_job(name)).position for name in names] == [3, 2, 1]
    assert state(await client.cancel_job(names[1])) == CANCELLED
    with pytest.raises(PreconditionFailed, match="CANCELLED"):
        await client.cancel_job(names[1])
    assert state(await client.wait_job(names[1])) == CANCELLED
    page = await client.list_jobs(page_size=2)
    assert [job.job_id for job in page.jobs] == [names[2], names[1]]
    rest = await client.list_jobs(page_size=2, page_token=page.next_page_token)
    assert ([job.job_id for job in rest.jobs], rest.next_page_token) == ([names[0]], "")
    assert [job.job_id for job in (await client.list_jobs(["cancelled"])).jobs] == [names[1]]
    with pytest.raises(NotFound):
        await client.cancel_job("nobody")
    with pytest.raises(NotFound):
        await anext(client.watch_job("nobody"))


async def test_the_same_id_with_anything_else_is_refused(client: AsyncClient) -> None:
    def ask(**changes: Any) -> Any:
        return client.submit_job(changes.pop("prompt", "a"), request_id="one", **changes)

    assert await ask() == await ask() == "one"
    for changes in ({"prompt": "b"}, {"seed": 1}, {"priority": "low"}):
        with pytest.raises(AlreadyExists):
            await ask(**changes)
    with pytest.raises(AlreadyExists):
        await client.submit_batch(["a"], request_id="one")


def submitting(**fields: Any) -> bytes:
    return gateway_pb2.SubmitJobRequest(**fields).SerializeToString()


GOOD = gateway_pb2.GenerateRequest(prompt="a")
BAD = [
    ("SubmitJob", submitting(requests=[GOOD, gateway_pb2.GenerateRequest(prompt="forbidden")]), "requests[1].prompt"),
    ("SubmitJob", submitting(requests=[GOOD], request=GOOD), "requests"),
    ("SubmitJob", submitting(requests=[GOOD] * 257), "requests"),
    ("SubmitJob", submitting(request=GOOD, priority=9), "priority"),
    ("ListJobs", gateway_pb2.ListJobsRequest(page_size=201).SerializeToString(), "page_size"),
    ("ListJobs", gateway_pb2.ListJobsRequest(page_token="x").SerializeToString(), "page_token"),
    ("ListJobs", gateway_pb2.ListJobsRequest(states=[gateway_pb2.JOB_STATE_UNSPECIFIED]).SerializeToString(), "states"),
    ("CancelJob", b"", "job_id"),
]


@pytest.mark.parametrize(("method", "payload", "field"), BAD)
async def test_a_bad_call_names_its_field(address: str, method: str, payload: bytes, field: str) -> None:
    found: Refusal = await asyncio.to_thread(refusal, address, method, payload)
    assert (found.code, found.fields) == (INVALID, (field,))


async def test_the_client_refuses_what_has_no_name(client: AsyncClient) -> None:
    for call, field in (
        (client.submit_job("a", priority="urgent"), "priority"),
        (client.list_jobs(["done"]), "states"),
        (client.submit_batch([]), "prompts"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await call
        assert caught.value.field == field


async def test_a_plain_client_learns_when_to_try_again(redis: "Redis", tmp_path: Path) -> None:
    """By google.rpc.RetryInfo in the status details; the project's own client by `retry_after_s`."""
    queue = JobQueue(redis, settings(max_queued_jobs=1, job_retry_after_s=7.5))
    await queue.open()
    async with gateway(queue, tmp_path) as address, AsyncClient(address) as client:
        await client.submit_job("a")
        with pytest.raises(Overloaded) as caught:
            await client.submit_job("b")
        assert caught.value.retry_after_s == 7.5
        async with grpc.aio.insecure_channel(address) as channel:
            call: Any = channel.unary_unary("/sdxs.v1.GatewayService/SubmitJob")
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call(submitting(request=GOOD))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    [raw] = [value for key, value in failed.value.trailing_metadata() if key == "grpc-status-details-bin"]
    [detail] = status_pb2.Status.FromString(raw).details
    info = error_details_pb2.RetryInfo()
    assert detail.Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 7500


@pytest.mark.parametrize(
    ("error", "seconds"),
    [(Overloaded("full"), 0.5), (Unavailable("away"), 1.0), (Overloaded("full", retry_after_s=30), 30), (NotFound("no"), None)],
)
async def test_errors_say_when_to_try_again(queue: JobQueue, tmp_path: Path, error: SdxsError, seconds: float | None) -> None:
    class Refusing(JobQueue):
        async def get(self, job_id: str, whole: bool = True) -> Job:
            raise error

    async with gateway(Refusing(queue.redis, queue.settings), tmp_path) as address, AsyncClient(address) as client:
        with pytest.raises(type(error)) as caught:
            await client.get_job("one")
        assert caught.value.retry_after_s == seconds


async def test_redis_that_is_away_is_unavailable(redis_url: str, tmp_path: Path) -> None:
    nobody = JobQueue(Redis.from_url("redis://127.0.0.1:1/0", protocol=2, retry=None), settings())
    async with gateway(nobody, tmp_path) as address, AsyncClient(address) as client:
        for call in (client.submit_job("a"), client.get_job("a"), client.list_jobs(), client.cancel_job("a")):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.retry_after_s == 1.0


async def test_the_blocking_client_does_the_same(address: str, queue: JobQueue, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()

    def talk(stop: Callable[[], None]) -> tuple[list[str], list[str]]:
        with Client(address) as client:
            job_id = client.submit_batch(["a", "b"], priority="high")
            seen = [state(job) for job in client.watch_job(job_id, timeout=30)]
            loop.call_soon_threadsafe(stop)
            time.sleep(1.5)  # its last look at the queue
            cancelled = client.submit_job("a", request_id="later")
            watching = client.watch_job(cancelled)
            next(watching)
            client.cancel_job(cancelled)
            states = [state(job) for job in watching]
            return seen, [*states, *(job.job_id for job in client.list_jobs(["succeeded", "cancelled"]).jobs)]

    async with Working(queue, tmp_path) as worker:
        talking = asyncio.create_task(asyncio.to_thread(talk, worker.stop))
        seen, rest = await talking
    assert seen[-1] == SUCCEEDED and set(seen) <= {QUEUED, RUNNING, SUCCEEDED}
    assert rest[-2] == "later"


# The command line


async def run(*arguments: str, **environment: str) -> str:
    """What `sdxs jobs …` prints."""
    done = await asyncio.to_thread(CliRunner().invoke, app, list(arguments), env=environment)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


async def test_jobs_by_command_line(address: str, client: AsyncClient, queue: JobQueue, tmp_path: Path) -> None:
    waiting = await client.submit_job("a")
    server = ("--server", address)
    assert waiting in await run("list", *server)
    assert [job["jobId"] for job in json.loads(await run("list", "--state", "queued", "--json", *server))] == [waiting]
    assert json.loads(await run("list", "--state", "failed", "--json", *server)) == []
    assert json.loads(await run("show", waiting, *server))["position"] == 1
    watching = asyncio.create_task(run("watch", waiting, *server))
    await asyncio.sleep(0.5)
    assert await run("cancel", waiting, *server) == f"{waiting}: cancelled\n"
    assert (await watching).splitlines() == ["queued, 0/1 done, position 1", "cancelled, 0/1 done"]
    for _ in range(3):
        await client.submit_job("a")
    assert len(json.loads(await run("list", "--limit", "2", "--json", *server))) == 2
    with pytest.raises(InvalidRequest):
        await run("list", "--state", "done", *server)


async def test_the_dead_by_command_line(client: AsyncClient, queue: JobQueue, redis_url: str, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        await client.submit_job(f"prompt of {name}", request_id=name)
        await queue.bury(await take(queue), f"poison in {name}")
    environment = {"SDXS_REDIS_URL": redis_url}
    rows = json.loads(await run("dead", "list", "--json", **environment))
    assert [row["job"] for row in rows] == ["three", "two", "one"]
    assert "poison in three" in rows[0]["why"]
    assert "two" in await run("dead", "list", **environment)
    assert [row["job"] for row in json.loads(await run("dead", "list", "--limit", "1", "--json", **environment))] == ["three"]
    shown = json.loads(await run("dead", "show", "two", **environment))
    assert (shown["request"]["request"]["prompt"], shown["job"]["state"]) == ("prompt of two", "JOB_STATE_FAILED")
    assert "poison in two" in shown["why"]
    assert await run("dead", "replay", "two", **environment) == "two: queued\n"
    assert (await take(queue)).job_id == "two"
    with pytest.raises(NotFound):
        await run("dead", "replay", "two", **environment)
    assert await run("dead", "replay", "--all", **environment) == "one: queued\nthree: queued\n"
    assert json.loads(await run("dead", "list", "--json", **environment)) == []
    assert [(await take(queue)).job_id for _ in range(2)] == ["one", "three"]
    with pytest.raises(InvalidRequest):
        await run("dead", "replay", **environment)
    with pytest.raises(Unavailable):
        await run("dead", "list", SDXS_REDIS_URL="redis://127.0.0.1:1/0")


async def test_a_job_is_its_tenants_and_says_how_long_it_waited(address: str, queue: JobQueue, tmp_path: Path) -> None:
    served = list[tuple[str, str]]()

    async def noting(payload: bytes, deadline: Deadline) -> bytes:
        served.append((deadline.tenant, deadline.priority.value))
        return await generated(payload, deadline)

    async with (
        asyncio.timeout(30),
        AsyncClient(address, tenant="acme") as client,
        AsyncClient(address, tenant="other") as other,
    ):
        job_id = await client.submit_job("apple", request_id="one")
        batch = await client.submit_batch(["a", "b"])
        with pytest.raises(AlreadyExists):
            await other.submit_job("apple", request_id="one")
        await asyncio.sleep(0.2)
        async with Working(queue, tmp_path, noting):
            ends = [[job async for job in client.watch_job(name)][-1] for name in (job_id, batch)]
    assert served == [("acme", "low")] * 3
    assert [job.tenant for job in ends] == ["acme", "acme"]
    waited = [ends[0].receipt, *(item.receipt for item in ends[1].items)]
    for receipt in waited:
        assert 0.2 <= receipt.job_queue_seconds <= (ends[1].finished.ToNanoseconds() - ends[0].created.ToNanoseconds()) / 1e9
