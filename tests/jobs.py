"""What the tests of jobs share: settings that make time short, a worker for the length of a block, and an end to wait for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from sdxs.errors import InvalidRequest
from sdxs.store import FileStore, ObjectStore
from sdxs.v1 import decoder_pb2, gateway_pb2
from services.fabric.deadline import Deadline
from services.fabric.endpoint import Endpoint
from services.fabric.job_records import OVER
from services.fabric.jobs import GROUP, Delivery, JobQueue
from services.fabric.models import ServedModel
from services.fabric.server import DataPlane
from services.gateway.checks import Order
from services.gateway.desk import JobDesk
from services.gateway.inputs import Inputs
from services.gateway.service import DESCRIPTOR, GatewayService
from services.settings import ServingSettings
from services.worker.service import Generate, Worker
from tests.tables import table_of

VISIBILITY_S = 1.5  # well above what a busy machine takes between two heartbeats
PNG = b"\x89PNG not really"
HIGH, NORMAL, LOW = gateway_pb2.JOB_PRIORITY_HIGH, gateway_pb2.JOB_PRIORITY_NORMAL, gateway_pb2.JOB_PRIORITY_LOW


def asking(*prompts: str, priority: int = 0, webhook_url: str = "") -> gateway_pb2.SubmitJobRequest:
    """A job as the gateway queues it: of one prompt, or a batch of several."""
    requests = [gateway_pb2.GenerateRequest(prompt=prompt, seed=1) for prompt in prompts]
    order = gateway_pb2.SubmitJobRequest(priority=priority, webhook_url=webhook_url)  # type: ignore[arg-type]
    if len(requests) == 1:
        order.request.CopyFrom(requests[0])
    else:
        order.requests.extend(requests)
    return order


REQUEST = asking("red apple")


def settings(**changes: object) -> ServingSettings:
    return ServingSettings.model_validate({"job_visibility_s": VISIBILITY_S, "job_max_deliveries": 3, **changes})


async def generated(payload: bytes, _: Deadline) -> bytes:
    """An image that says what it was asked for."""
    request = gateway_pb2.GenerateRequest.FromString(payload)
    image = decoder_pb2.Image(data=PNG + request.prompt.encode(), format=decoder_pb2.IMAGE_FORMAT_PNG, width=1, height=1)
    return gateway_pb2.GenerateResponse(images=[image], receipt=gateway_pb2.Receipt(seeds=[request.seed])).SerializeToString()


async def take(queue: JobQueue, consumer: str = "worker") -> Delivery:
    """The next job, which must be there."""
    delivery = await queue.take(consumer, wait_s=0.1)
    assert delivery is not None
    return delivery


async def fall_silent(queue: JobQueue, delivery: Delivery, consumer: str) -> None:
    """As if the worker had not been heard of for long: the next to look for such jobs gets this one."""
    idle_ms = int(queue.settings.job_visibility_s * 1000) + 1000
    stream = queue.streams[delivery.job_class - 1]
    await queue.redis.xclaim(stream, GROUP, consumer, 0, [delivery.entry], idle=idle_ms, justid=True)


class Chain:
    """Stages that take every prompt but "forbidden"."""

    ready = True

    async def check_prompt(self, order: Order, _: Deadline) -> None:
        if order.prompt == "forbidden":
            raise InvalidRequest("prompt", order.prompt, "something else")


@contextlib.asynccontextmanager
async def gateway(queue: JobQueue, folder: Path, max_streams: int = 8, store: ObjectStore | None = None) -> AsyncIterator[str]:
    """The address of a gateway with a desk for jobs in front of that queue, and no stages behind it.

    Its store of artifacts is the folder, or `store`.
    """
    artifacts = store or FileStore(folder)
    table = table_of(ServedModel("tiny", "sha256:0", 32, 32, 16), Chain())
    desk, inputs = JobDesk(queue, lambda: artifacts, 60), Inputs(lambda: artifacts, queue.settings)
    service = GatewayService(table, desk, inputs, queue.settings)
    plane = DataPlane(Endpoint(DESCRIPTOR, service, 64, max_streams), 64 << 20)
    await plane.start("127.0.0.1:0")
    try:
        yield plane.address
    finally:
        await plane.drain(0)


class Working:
    """A worker that runs for the length of a block."""

    def __init__(self, queue: JobQueue, folder: Path, generate: Generate = generated, **changes: object) -> None:
        self.worker = Worker(queue, lambda: FileStore(folder), generate, settings(**changes))

    async def __aenter__(self) -> Worker:
        self.running = asyncio.create_task(self.worker.run())
        return self.worker

    async def __aexit__(self, *_: object) -> None:
        self.worker.stop()
        await self.running


async def ended(queue: JobQueue, job_id: str, seconds: float = 15) -> gateway_pb2.GetJobResponse:
    async with asyncio.timeout(seconds):
        while True:
            job = await queue.get(job_id)
            if job.state in OVER:
                return job
            await asyncio.sleep(0.02)
