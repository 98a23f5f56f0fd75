"""All rooms in one process: the same services behind the same gateway, joined by function calls instead of gRPC.

Residuals go from the ControlNet's room to the U-Net's by shared memory here too; with `fused` there is no room to go between.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import services.controlnet.service as controlnet
import services.decoder.service as decoder
import services.text_encoder.service as text_encoder
import services.unet.service as unet
from sdxs import registry
from sdxs.bundle import Manifest
from sdxs.store import open_store
from services.fabric.endpoint import Endpoint
from services.fabric.jobs import open_queue
from services.fabric.peers import LocalStage
from services.fabric.replica import StageService
from services.fabric.server import DataPlane
from services.gateway import web
from services.gateway.chain import Chain, PromptCache
from services.gateway.desk import open_desk
from services.gateway.health import keep_health
from services.gateway.inputs import open_inputs
from services.gateway.service import DESCRIPTOR, GatewayService, served_model
from services.settings import ServingSettings
from services.worker.service import Worker


@contextlib.asynccontextmanager
async def serve_local(model: str, settings: ServingSettings, fused: bool = False) -> AsyncIterator[DataPlane]:
    """A running server; leaving the block drains it. With a Redis URL in the settings there are jobs too."""
    folder, manifest = await asyncio.to_thread(registry.open_model, model, settings)
    rooms, stages = await asyncio.to_thread(_load, folder, manifest, settings, fused)
    served = served_model(manifest)
    text, denoiser, images, *guided = stages
    chain = Chain(text, denoiser, images, PromptCache(settings.prompt_cache_bytes), *guided)
    models, chains = {served.name: served}, {served.name: chain}
    service = GatewayService(models, chains, open_desk(settings), open_inputs(settings), settings)
    endpoint = Endpoint(DESCRIPTOR, service, settings.gateway_max_in_flight, settings.max_watchers)
    plane = DataPlane(endpoint, settings.gateway_max_message_bytes)
    await plane.start(settings.gateway_address)
    health = asyncio.create_task(keep_health(service, plane))
    try:
        async with web.serving(service.sessions, settings), _drained(plane, settings), _working(endpoint, settings):
            yield plane
    finally:
        health.cancel()
        await service.close()
        for room in rooms:
            room.close()


@contextlib.asynccontextmanager
async def _drained(plane: DataPlane, settings: ServingSettings) -> AsyncIterator[None]:
    """At the end the calls in flight are answered, and the streams told."""
    try:
        yield
    finally:
        await plane.drain(settings.drain_s)


def _load(
    folder: Path, manifest: Manifest, settings: ServingSettings, fused: bool
) -> tuple[list[StageService], list[LocalStage]]:
    """The rooms of the bundle in `folder` and their stages: text encoder, U-Net, decoder, and the ControlNets' if they have one."""
    digest, has_controlnets = manifest.digest, bool(manifest.controlnets)
    rooms: list[StageService] = [
        text_encoder.load(folder, digest, settings),
        unet.load(folder, digest, settings, has_controlnets and fused),
        decoder.load(folder, digest, settings),
    ]
    descriptors = [text_encoder.DESCRIPTOR, unet.DESCRIPTOR, decoder.DESCRIPTOR]
    stages = [
        LocalStage(Endpoint(descriptor, room, settings.max_in_flight))
        for descriptor, room in zip(descriptors, rooms, strict=True)
    ]
    if has_controlnets and not fused:
        rooms.append(controlnet.load(folder, digest, settings, stages[1], node=""))
        stages.append(LocalStage(Endpoint(controlnet.DESCRIPTOR, rooms[-1], settings.max_in_flight)))
    return rooms, stages


@contextlib.asynccontextmanager
async def _working(gateway: Endpoint, settings: ServingSettings) -> AsyncIterator[None]:
    """A worker beside the gateway, if there is a queue."""
    if not settings.redis_url:
        yield
        return
    stage = LocalStage(gateway)
    queue = open_queue(settings)
    worker = Worker(queue, lambda: open_store(settings, "artifacts"), lambda *job: stage.call("Generate", *job), settings)
    running = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.stop()
        await asyncio.wait([running], timeout=settings.drain_s)
        running.cancel()
        await queue.close()
