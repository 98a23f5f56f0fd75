"""All rooms in one process: the same services behind the same gateway, joined by function calls instead of gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from google.protobuf.descriptor import ServiceDescriptor

import services.decoder.service as decoder
import services.text_encoder.service as text_encoder
import services.unet.service as unet
from sdxs import registry
from sdxs.store import open_store
from services.fabric.endpoint import Endpoint
from services.fabric.jobs import open_queue
from services.fabric.peers import LocalStage
from services.fabric.replica import StageService
from services.fabric.server import DataPlane
from services.gateway.chain import Chain, PromptCache
from services.gateway.health import keep_health
from services.gateway.service import DESCRIPTOR, GatewayService, open_desk, served_model
from services.settings import ServingSettings
from services.worker.service import Worker


@contextlib.asynccontextmanager
async def serve_local(model: str, settings: ServingSettings) -> AsyncIterator[DataPlane]:
    """A running server; leaving the block drains it. With a Redis URL in the settings there are jobs too."""
    folder, manifest = await asyncio.to_thread(registry.open_model, model, settings)
    rooms = await asyncio.to_thread(_load, folder, manifest.digest, settings)
    served = served_model(manifest)
    text, denoiser, images = (LocalStage(Endpoint(descriptor, room, settings.max_in_flight)) for descriptor, room in rooms)
    chain = Chain(text, denoiser, images, PromptCache(settings.prompt_cache_bytes))
    service = GatewayService({served.name: served}, {served.name: chain}, open_desk(settings), settings)
    endpoint = Endpoint(DESCRIPTOR, service, settings.gateway_max_in_flight)
    plane = DataPlane(endpoint, settings.max_message_bytes)
    await plane.start(settings.gateway_address)
    health = asyncio.create_task(keep_health(service, plane))
    try:
        async with _working(endpoint, settings):
            yield plane
    finally:
        health.cancel()
        await plane.drain(settings.drain_s)
        await service.close()
        for _, room in rooms:
            room.close()


def _load(folder: Path, model_digest: str, settings: ServingSettings) -> list[tuple[ServiceDescriptor, StageService]]:
    """The rooms of the bundle in `folder`, in the order of the chain."""
    return [(room.DESCRIPTOR, room.load(folder, model_digest, settings)) for room in (text_encoder, unet, decoder)]


@contextlib.asynccontextmanager
async def _working(gateway: Endpoint, settings: ServingSettings) -> AsyncIterator[None]:
    """A worker beside the gateway, if there is a queue."""
    if not settings.redis_url:
        yield
        return
    stage = LocalStage(gateway)
    queue = open_queue(settings)
    worker = Worker(queue, lambda: open_store(settings), lambda *job: stage.call("Generate", *job), settings)
    running = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.stop()
        await asyncio.wait([running], timeout=settings.drain_s)
        running.cancel()
        await queue.close()
