"""sdxs.v1.GatewayService: requests checked, walked through the stages one by one or as a stream of frames, or queued as jobs.

Knows the chain, the job queue and the object store by their methods; computes nothing itself.
"""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta

import numpy as np
from redis.exceptions import RedisError

from sdxs import control, images
from sdxs.bundle import Manifest
from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed, Unavailable
from sdxs.store import ObjectStore, open_store
from sdxs.v1 import control_pb2, decoder_pb2, gateway_pb2, stream_pb2
from services.fabric.deadline import Deadline
from services.fabric.jobs import JobQueue, open_queue
from services.gateway import checks
from services.gateway.chain import Chain
from services.gateway.outbox import Send
from services.gateway.stream import Sessions
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_BLANK = images.encode(np.zeros((8, 8, 3), np.uint8), images.PNG, "")
"""A control image that shows nothing."""

DESCRIPTOR = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"]


class JobDesk:
    """Where jobs are handed in and asked about. Redis and the store not answering is UNAVAILABLE."""

    def __init__(self, queue: JobQueue, store: Callable[[], ObjectStore], url_ttl_s: int) -> None:
        self._queue = queue
        self._store = functools.cache(store)  # opened at the first job: images without jobs need no store
        self._url_ttl = timedelta(seconds=url_ttl_s)

    async def submit(self, job_id: str, asked: bytes, request: bytes) -> gateway_pb2.SubmitJobResponse:
        """See JobQueue.submit."""
        try:
            state = await self._queue.submit(job_id, asked, request)
        except RedisError as error:
            raise Unavailable("the job queue does not answer") from error
        return gateway_pb2.SubmitJobResponse(job_id=job_id, state=state)

    async def get(self, job_id: str) -> gateway_pb2.GetJobResponse:
        """The job with a fresh URL for each image."""
        try:
            job = await self._queue.get(job_id)
        except RedisError as error:
            raise Unavailable("the job queue does not answer") from error
        if job.images:
            await asyncio.to_thread(self._sign, job)
        return job

    async def close(self) -> None:
        """Hang up."""
        await self._queue.close()

    def _sign(self, job: gateway_pb2.GetJobResponse) -> None:
        """Set the URLs. Raises Unavailable when the store does not answer."""
        expires = datetime.now(UTC) + self._url_ttl
        try:
            for image in job.images:
                image.url = self._store().presign_get(image.key, self._url_ttl)
                image.url_expires.FromDatetime(expires)
        except Exception as error:
            logger.exception("cannot sign the URLs of job %s", job.job_id)
            raise Unavailable("the object store does not answer") from error


class GatewayService:
    """Serves the models of `chains`, one chain each; without a desk jobs are refused."""

    def __init__(
        self,
        models: Mapping[str, checks.ServedModel],
        chains: Mapping[str, Chain],
        desk: JobDesk | None,
        settings: ServingSettings,
    ) -> None:
        self._models = models
        self._chains = chains
        self._desk = desk
        self._default_deadline_s = settings.default_deadline_s
        self._max_image_bytes = settings.max_image_bytes
        self.sessions = Sessions(models, chains, settings)

    @property
    def ready(self) -> bool:
        """Whether every stage of every model has a replica."""
        return all(chain.ready for chain in self._chains.values())

    async def warm(self) -> None:
        """One image of each model through all stages, ControlNets included. Raises SdxsError when a stage does not answer."""
        for model in self._models.values():
            await self.generate(gateway_pb2.GenerateRequest(prompt="warm", model=model.name, seed=0), Deadline())
            for controlnet in model.controlnets:
                blank = control_pb2.Control(image=_BLANK, controlnet=controlnet, preprocessed=True)
                request = gateway_pb2.GenerateRequest(prompt="warm", model=model.name, seed=0, controls=[blank])
                await self.generate(request, Deadline())

    async def close(self) -> None:
        """After the last call."""
        if self._desk is not None:
            await self._desk.close()

    async def generate(self, request: gateway_pb2.GenerateRequest, deadline: Deadline) -> gateway_pb2.GenerateResponse:
        """Text to images. Raises SdxsError."""
        began = time.monotonic()
        order = checks.order(request, self._models, self._max_image_bytes)
        deadline = deadline.within(self._default_deadline_s)
        made = await self._chains[order.model.name].run(order, checks.receipts(order), deadline)
        return gateway_pb2.GenerateResponse(images=made.images, receipt=_receipt(order, made, time.monotonic() - began))

    async def stream(self, requests: AsyncIterator[stream_pb2.StreamRequest], send: Send) -> None:
        """A session of frames. Raises SdxsError."""
        await self.sessions.run(requests, send)

    async def drain(self, grace_s: float) -> None:
        """End the sessions."""
        await self.sessions.drain(grace_s)

    async def submit_job(self, request: gateway_pb2.SubmitJobRequest, deadline: Deadline) -> gateway_pb2.SubmitJobResponse:
        """Queue it, if `generate` would not refuse it. Raises SdxsError; fields of the inner request are named `request.…`."""
        desk = self._desk_or_raise()
        job_id = checks.job_id(request.request_id)
        try:
            order = checks.order(request.request, self._models, self._max_image_bytes)
            await asyncio.gather(*(asyncio.to_thread(control.read_image, data, field) for field, data in checks.images(order)))
            await self._chains[order.model.name].check_prompt(order.prompt, deadline.within(self._default_deadline_s))
        except InvalidRequest as error:
            raise InvalidRequest(f"request.{error.field}", error.value, error.allowed) from None
        except NotFound as error:
            error.field = f"request.{error.field}"
            raise
        chosen = gateway_pb2.GenerateRequest()
        chosen.CopyFrom(request.request)
        chosen.model, chosen.seed = order.model.name, order.seeds[0]
        asked = request.request.SerializeToString(deterministic=True)
        return await desk.submit(job_id, asked, chosen.SerializeToString())

    async def get_job(self, request: gateway_pb2.GetJobRequest, deadline: Deadline) -> gateway_pb2.GetJobResponse:
        """State, and URLs once there is something to fetch. Raises NotFound."""
        deadline.remaining()
        if not request.job_id:
            raise InvalidRequest("job_id", "", "an id from SubmitJob")
        return await self._desk_or_raise().get(checks.job_id(request.job_id))

    async def list_models(self, _: gateway_pb2.ListModelsRequest, deadline: Deadline) -> gateway_pb2.ListModelsResponse:
        """The models served here, the default first."""
        deadline.remaining()
        models = [
            gateway_pb2.Model(
                name=model.name,
                digest=model.digest,
                width=model.width,
                height=model.height,
                max_prompt_tokens=model.max_prompt_tokens,
                controlnets=[gateway_pb2.ControlNet(name=name, types=types) for name, types in model.controlnets.items()],
            )
            for model in self._models.values()
        ]
        return gateway_pb2.ListModelsResponse(models=models)

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
        width=order.model.width,
        height=order.model.height,
        unet_batch=made.unet_batch,
        decoder_batch=made.batch,
        deterministic=order.deterministic,
        seconds=seconds,
        controlnet_batch=made.controlnet_batch,
        controls=[_applied(control) for control in order.controls],
        init_image_sha256=checks.sha256(order.init_image),
        strength=order.strength if order.init_image else 0.0,
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


def served_model(manifest: Manifest) -> checks.ServedModel:
    """What the gateway needs to know of a bundle."""
    size = manifest.image_size
    return checks.ServedModel(manifest.name, manifest.digest, size, size, manifest.max_prompt_tokens, manifest.controlnets)


def open_desk(settings: ServingSettings) -> JobDesk | None:
    """The desk of the queue and the store the settings name; None without a queue."""
    if not settings.redis_url:
        return None
    return JobDesk(open_queue(settings), lambda: open_store(settings), settings.url_ttl_s)
