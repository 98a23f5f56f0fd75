"""sdxs.v1.GatewayService: requests checked, walked through the stages one by one or as a stream of frames, or queued as jobs.

Knows the chain and the jobs' desk by their methods; computes nothing itself.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sdxs import control
from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed
from sdxs.v1 import control_pb2, decoder_pb2, gateway_pb2, lora_pb2, stream_pb2
from services.fabric.deadline import Deadline
from services.fabric.times import products
from services.gateway import checks
from services.gateway.desk import JobDesk
from services.gateway.inputs import Inputs
from services.gateway.names import by_name
from services.gateway.outbox import Send
from services.gateway.stream import Sessions
from services.gateway.table import ModelTable
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_CHECKS_AT_ONCE = 8
"""Requests of one batch that the text encoder is asked about at a time."""

DESCRIPTOR = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"]


@dataclass(frozen=True)
class _Chosen:
    """A request of a job."""

    kept: gateway_pb2.GenerateRequest
    """As it waits in the queue."""
    asked: gateway_pb2.GenerateRequest
    """What was asked for, however the images came: that it is the same job is told by it."""


class GatewayService:
    """Serves the models of a table; without a desk jobs are refused."""

    def __init__(self, models: ModelTable, desk: JobDesk | None, inputs: Inputs, settings: ServingSettings) -> None:
        self._models = models
        self._desk = desk
        self._inputs = inputs
        self._default_deadline_s = settings.default_deadline_s
        self._max_job_requests = settings.max_job_requests
        self.sessions = Sessions(models, settings)

    @property
    def ready(self) -> bool:
        """Whether images can be drawn; see ModelTable."""
        return self._models.ready

    async def close(self) -> None:
        """After the last call."""
        if self._desk is not None:
            await self._desk.close()

    async def generate(self, request: gateway_pb2.GenerateRequest, deadline: Deadline) -> gateway_pb2.GenerateResponse:
        """Text to images. Raises SdxsError."""
        began = time.monotonic()
        deadline = deadline.within(self._default_deadline_s)
        filled = await self._models.loras.settled(await self._inputs.filled(request, deadline), deadline)
        with self._models.take(filled) as (order, chain):
            made = await chain.run(order, checks.receipts(order), deadline)
        return gateway_pb2.GenerateResponse(images=made.images, receipt=_receipt(order, made, time.monotonic() - began))

    async def stream(self, requests: AsyncIterator[stream_pb2.StreamRequest], send: Send, deadline: Deadline) -> None:
        """A session of frames, drawn for the caller's tenant and in its class. Raises SdxsError."""
        await self.sessions.run(requests, send, deadline)

    async def drain(self, grace_s: float) -> None:
        """Send watchers away, end the sessions."""
        if self._desk is not None:
            self._desk.leave()
        await self.sessions.drain(grace_s)

    async def submit_job(self, request: gateway_pb2.SubmitJobRequest, deadline: Deadline) -> gateway_pb2.SubmitJobResponse:
        """Queue it, if `generate` would not refuse it. Raises SdxsError; fields of inner requests are named `request.…`."""
        desk = self._desk_or_raise()
        job_id = checks.job_id(request.request_id)
        wanted = checks.job_requests(request, self._max_job_requests)
        deadline = deadline.within(self._default_deadline_s)
        gate = asyncio.Semaphore(_CHECKS_AT_ONCE)
        choosing = [asyncio.create_task(self._choose(name, each, gate, deadline)) for name, each in wanted.items()]
        try:
            chosen = await asyncio.gather(*choosing)
        finally:
            for task in choosing:  # after a first refusal nobody asks about the others
                task.cancel()
        order = gateway_pb2.SubmitJobRequest(priority=request.priority, webhook_url=request.webhook_url)
        asked = gateway_pb2.SubmitJobRequest()
        asked.CopyFrom(request)
        asked.ClearField("request_id")
        if request.requests:
            order.requests.extend(each.kept for each in chosen)
            del asked.requests[:]
            asked.requests.extend(each.asked for each in chosen)
        else:
            order.request.CopyFrom(chosen[0].kept)
            asked.request.CopyFrom(chosen[0].asked)
        return await desk.submit(job_id, asked.SerializeToString(deterministic=True), order, deadline.tenant)

    async def _choose(
        self, field: str, asked: gateway_pb2.GenerateRequest, gate: asyncio.Semaphore, deadline: Deadline
    ) -> "_Chosen":
        """The request with the server's choices, its images in the store.

        Raises what `generate` would, the field's name after that of the request.
        """
        try:
            async with gate:
                filled = await self._inputs.filled(asked, deadline)
                settled = await self._models.loras.settled(filled, deadline)
                with self._models.take(settled) as (order, chain):
                    files = checks.images(order)
                    await asyncio.gather(*(asyncio.to_thread(control.read_image, data, name) for name, data in files))
                    await chain.check_prompt(order, deadline)
                kept = await self._inputs.kept(settled)
        except InvalidRequest as error:
            raise InvalidRequest(f"{field}.{error.field}", error.value, error.allowed) from None
        except NotFound as error:
            error.field = f"{field}.{error.field}"
            raise
        kept.model, kept.seed = asked.model or order.model.name, order.seeds[0]  # who names a digest gets no other bundle
        return _Chosen(kept, by_name(filled, above=0))

    async def create_upload(
        self, request: gateway_pb2.CreateUploadRequest, deadline: Deadline
    ) -> gateway_pb2.CreateUploadResponse:
        """Where to send an image, to name it afterwards. Raises InvalidRequest, PreconditionFailed."""
        deadline.remaining()
        return await self._inputs.create_upload(request)

    async def get_job(self, request: gateway_pb2.GetJobRequest, deadline: Deadline) -> gateway_pb2.GetJobResponse:
        """State, and URLs once there is something to fetch. Raises NotFound."""
        deadline.remaining()
        return await self._desk_or_raise().get(checks.known_job_id(request.job_id))

    async def list_jobs(self, request: gateway_pb2.ListJobsRequest, deadline: Deadline) -> gateway_pb2.ListJobsResponse:
        """One page of jobs, newest first."""
        deadline.remaining()
        return await self._desk_or_raise().list_jobs(request)

    async def watch_job(
        self, request: gateway_pb2.WatchJobRequest, deadline: Deadline
    ) -> AsyncIterator[gateway_pb2.WatchJobResponse]:
        """The job at each change until it has ended. Raises NotFound."""
        deadline.remaining()
        async for job in self._desk_or_raise().watch(checks.known_job_id(request.job_id)):
            yield gateway_pb2.WatchJobResponse(job=job)

    async def cancel_job(self, request: gateway_pb2.CancelJobRequest, deadline: Deadline) -> gateway_pb2.CancelJobResponse:
        """The cancelled job. Raises NotFound, or PreconditionFailed when it has ended."""
        deadline.remaining()
        return gateway_pb2.CancelJobResponse(job=await self._desk_or_raise().cancel(checks.known_job_id(request.job_id)))

    async def list_models(self, _: gateway_pb2.ListModelsRequest, deadline: Deadline) -> gateway_pb2.ListModelsResponse:
        """The models served here, the default first."""
        deadline.remaining()
        return gateway_pb2.ListModelsResponse(models=self._models.listing())

    async def list_loras(self, request: gateway_pb2.ListLorasRequest, deadline: Deadline) -> gateway_pb2.ListLorasResponse:
        """The LoRAs that requests may name. Raises what the store does."""
        deadline.remaining()
        return await self._models.loras.listing(request.model)

    def _desk_or_raise(self) -> JobDesk:
        """The desk. Raises PreconditionFailed without one."""
        if self._desk is None:
            raise PreconditionFailed("this server has no job queue: SDXS_REDIS_URL is empty")
        return self._desk


def _receipt(order: checks.Order, made: decoder_pb2.DecodeResponse, seconds: float) -> gateway_pb2.Receipt:
    """What was done."""
    return gateway_pb2.Receipt(
        model=order.model.name,
        model_digest=order.model.digest,
        prompt=order.prompt,
        seeds=order.seeds,
        width=order.size.width,
        height=order.size.height,
        unet_batch=made.unet_batch,
        decoder_batch=made.batch,
        deterministic=order.deterministic,
        seconds=seconds,
        controlnet_batch=made.controlnet_batch,
        controls=[_applied(control) for control in order.controls],
        init_image_sha256=checks.sha256(order.init_image),
        strength=order.strength if order.init_image else 0.0,
        stages=made.times,
        software=products(),
        loras=[lora_pb2.AppliedLora(name=lora.name, digest=lora.digest, scale=lora.scale) for lora in order.loras],
    )


def _applied(asked: control_pb2.Control) -> gateway_pb2.AppliedControl:
    """Without the image."""
    return gateway_pb2.AppliedControl(
        controlnet=asked.controlnet,
        type=asked.type,
        scale=asked.scale,
        guess=asked.guess,
        preprocessed=asked.preprocessed,
        image_sha256=checks.sha256(asked.image),
    )
