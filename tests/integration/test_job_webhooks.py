"""Webhooks of ended jobs: a receiver of its own, a real Redis-compatible server, workers that die."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from redis.asyncio import Redis

from sdxs.client import AsyncClient
from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.store import FileStore
from sdxs.v1 import gateway_pb2
from services.fabric.dead_jobs import find_dead, replay
from services.fabric.jobs import JobQueue
from tests.jobs import Working, asking, ended, gateway, settings, take

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
FAST: dict[str, object] = {
    "webhook_secret": SECRET,
    "webhook_allow_http": True,
    "webhook_allow_private": True,
    "webhook_timeout_s": 1.0,
    "webhook_pause_s": 0.2,
}


@dataclass
class Receiver:
    """Keeps what comes, and answers with the next of `answers`, then with 204; None: not at all."""

    url: str = ""
    answers: list[int | None] = field(default_factory=list)
    calls: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        self.calls.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        status = self.answers.pop(0) if self.answers else 204
        if status is None:
            await asyncio.sleep(1000)
        headers = {"location": self.url} if status in (301, 307) else {}
        return web.Response(status=status or 500, headers=headers)

    async def got(self, number: int, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while len(self.calls) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    application = web.Application()
    application.router.add_post("/hook", receiver.take)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield receiver
    await runner.cleanup()


Opened = Callable[..., JobQueue]


@pytest.fixture
async def opened(queue: JobQueue, redis: "Redis") -> Opened:
    """Queues with settings for webhooks."""
    return lambda **changes: JobQueue(redis, settings(**{**FAST, **changes}))


async def settled(redis: "Redis", seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while await redis.zcard("{sdxs}:webhooks"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def checked(headers: dict[str, str], body: bytes) -> dict[str, object]:
    """The job, after a check of the signature by the specification's text alone."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    mac = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{mac}"
    assert headers["content-type"] == "application/json"
    found: dict[str, object] = json.loads(body)
    return found


async def test_an_ended_job_is_told(opened: Opened, redis: "Redis", receiver: Receiver, tmp_path: Path) -> None:
    queue = opened()
    await queue.submit("single", b"", asking("a", webhook_url=receiver.url))
    await queue.submit("batch", b"", asking("a", "b", webhook_url=receiver.url))
    await queue.submit("quiet", b"", asking("a"))
    await queue.submit("cancelled", b"", asking("a", webhook_url=receiver.url))
    await queue.cancel("cancelled")
    async with Working(queue, tmp_path):
        await ended(queue, "quiet")
        await receiver.got(3)
        await settled(redis)
    jobs = {str(job["jobId"]): job for job in (checked(*call) for call in receiver.calls)}
    assert {name: job["state"] for name, job in jobs.items()} == {
        "single": "JOB_STATE_SUCCEEDED",
        "batch": "JOB_STATE_SUCCEEDED",
        "cancelled": "JOB_STATE_CANCELLED",
    }
    assert jobs["single"]["images"][0]["url"] == FileStore(tmp_path).presign_get("results/single/0.png", None)  # type: ignore[index, arg-type]
    assert [len(item["images"]) for item in jobs["batch"]["items"]] == [1, 1]  # type: ignore[attr-defined]
    assert {headers["webhook-id"] for headers, _ in receiver.calls} == {"single.1", "batch.1", "cancelled.1"}


async def test_a_receiver_that_fails_is_called_again(
    opened: Opened, redis: "Redis", receiver: Receiver, tmp_path: Path
) -> None:
    queue = opened()
    receiver.answers = [500, None, 307, 429]
    await queue.submit("one", b"", asking("a", webhook_url=receiver.url))
    loop = asyncio.get_running_loop()
    async with Working(queue, tmp_path):
        await receiver.got(1)
        began = loop.time()
        await receiver.got(5)
        assert loop.time() - began > 0.2 + 1.0 + 0.4 + 0.8 + 1.6, "the pauses double; one call waited for its time-out"
        await settled(redis)
    assert len(receiver.calls) == 5, "nor is the redirect followed"
    assert {headers["webhook-id"] for headers, _ in receiver.calls} == {"one.1"}
    for call in receiver.calls:
        assert checked(*call)["jobId"] == "one"
    times = [int(headers["webhook-timestamp"]) for headers, _ in receiver.calls]
    assert times == sorted(times) and times[-1] > times[0], "each try has its own time"


async def test_calls_end_when_they_are_too_many_or_unwanted(
    opened: Opened, redis: "Redis", receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = opened(webhook_max_calls=2)
    receiver.answers = [500, 500]
    await queue.submit("one", b"", asking("a", webhook_url=receiver.url))
    async with Working(queue, tmp_path):
        await receiver.got(2)
        await settled(redis)
        receiver.answers = [410]
        await queue.submit("gone", b"", asking("a", webhook_url=receiver.url))
        await receiver.got(3)
        await settled(redis)
    assert len(receiver.calls) == 3
    assert "the webhook of job one is given up after 2 calls; the last: status 500" in caplog.text


DYING_CALLER = """
import asyncio
from services.fabric.jobs import open_queue
from services.settings import ServingSettings
from services.worker.service import Worker

async def never(payload, deadline):
    await asyncio.sleep(1000)

settings = ServingSettings()
asyncio.run(Worker(open_queue(settings), lambda: None, never, settings).run())
"""


async def test_a_killed_workers_webhook_is_called_by_another(
    opened: Opened, redis: "Redis", redis_url: str, receiver: Receiver, tmp_path: Path
) -> None:
    queue = opened()
    await queue.submit("orphan", b"", asking("a", webhook_url=receiver.url))
    await queue.succeed(await take(queue), gateway_pb2.GetJobResponse())
    receiver.answers = [None]
    variables = {f"SDXS_{name.upper()}": str(value) for name, value in FAST.items()}
    environment = {**os.environ, **variables, "SDXS_REDIS_URL": redis_url}
    dying = await asyncio.create_subprocess_exec(sys.executable, "-c", DYING_CALLER, env=environment)
    try:
        await receiver.got(1, seconds=100)  # a cold disk
        dying.send_signal(signal.SIGKILL)  # in the middle of its call
        await dying.wait()
        async with Working(queue, tmp_path):
            await receiver.got(2)
            await settled(redis)
    finally:
        with contextlib.suppress(ProcessLookupError):
            dying.kill()
        await dying.wait()
    assert [checked(*call)["jobId"] for call in receiver.calls] == ["orphan", "orphan"]
    assert receiver.calls[0][0]["webhook-id"] == receiver.calls[1][0]["webhook-id"]


async def test_a_replayed_jobs_end_is_other_news(opened: Opened, redis: "Redis", receiver: Receiver, tmp_path: Path) -> None:
    queue = opened()
    await queue.submit("one", b"", asking("a", webhook_url=receiver.url))
    await queue.bury(await take(queue), "poison")
    async with Working(queue, tmp_path):
        await receiver.got(1)
        await settled(redis)
        await replay(queue, await find_dead(queue, "one"))
        await receiver.got(2)
        await settled(redis)
    assert [(headers["webhook-id"], checked(headers, body)["state"]) for headers, body in receiver.calls] == [
        ("one.1", "JOB_STATE_FAILED"),
        ("one.2", "JOB_STATE_SUCCEEDED"),
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"])
async def test_no_name_leads_into_the_servers_network(
    opened: Opened, redis: "Redis", receiver: Receiver, tmp_path: Path, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A URL that was let in, as by a name that leads elsewhere by now, is stopped where the connection is made."""
    queue = opened(webhook_allow_private=False, webhook_max_calls=1)
    await queue.submit("inside", b"", asking("a", webhook_url=receiver.url.replace("127.0.0.1", host)))
    async with Working(queue, tmp_path):
        await ended(queue, "inside")
        await settled(redis)
    assert receiver.calls == []
    assert "the webhook of job inside is given up" in caplog.text


async def test_the_gateway_refuses_what_leads_inside(
    opened: Opened, queue: JobQueue, receiver: Receiver, tmp_path: Path
) -> None:
    careful = opened(webhook_allow_private=False, webhook_allow_http=False)
    async with gateway(careful, tmp_path) as address, AsyncClient(address) as client:
        for url in (
            receiver.url,
            "https://127.0.0.1/hook",
            "https://localhost/hook",
            "https://169.254.169.254/latest/meta-data",
        ):
            with pytest.raises(InvalidRequest) as caught:
                await client.submit_job("a", webhook_url=url)
            assert caught.value.field == "webhook_url"
        await client.submit_job("a", webhook_url="https://1.1.1.1/hook")
    async with gateway(queue, tmp_path) as address, AsyncClient(address) as client:
        with pytest.raises(PreconditionFailed, match="SDXS_WEBHOOK_SECRET"):
            await client.submit_job("a", webhook_url="https://1.1.1.1/hook")
