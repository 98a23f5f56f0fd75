"""All rooms in one process: the same services behind the same gateway, joined by function calls instead of gRPC.

Residuals go from the ControlNet's room to the U-Net's by shared memory here too; with `fused` there is no room to go between.
A bundle that takes over is loaded beside the one that is served, as on a cluster.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Sequence

import services.controlnet.service as controlnet
import services.decoder.service as decoder
import services.text_encoder.service as text_encoder
import services.unet.service as unet
from sdxs import registry
from sdxs.errors import Unavailable
from sdxs.store import open_store
from services.fabric.endpoint import Endpoint
from services.fabric.jobs import open_queue
from services.fabric.models import Plan, Version, Wanted, application_name, served_model
from services.fabric.peers import LocalStage
from services.fabric.pointers import Pointer, Pointers, open_all
from services.fabric.replica import StageService
from services.fabric.server import DataPlane
from services.gateway import web
from services.gateway.cache import ByteCache
from services.gateway.chain import Chain
from services.gateway.desk import open_desk
from services.gateway.health import keep_health
from services.gateway.inputs import open_inputs
from services.gateway.keeper import Keeper
from services.gateway.loras import open_loras
from services.gateway.service import DESCRIPTOR, GatewayService
from services.gateway.table import Entry, ModelTable
from services.settings import ServingSettings
from services.worker.service import Worker

logger = logging.getLogger(__name__)

_LOOK_S = 0.02

_Room = tuple[list[StageService], list[LocalStage]]


@contextlib.asynccontextmanager
async def serve_local(models: str | Sequence[str], settings: ServingSettings, fused: bool = False) -> AsyncIterator[DataPlane]:
    """A running server; leaving the block drains it. With a Redis URL in the settings there are jobs too.

    Raises what `open_all` does when a model is missing or not whole, and Unavailable when none can be loaded.
    """
    references = [models] if isinstance(models, str) else list(models)
    found = await asyncio.to_thread(open_all, references, settings)
    cache = ByteCache(settings.prompt_cache_bytes)
    table = ModelTable(settings.max_image_bytes, open_loras(settings))
    keeper = Keeper(table, functools.partial(_open, cache=cache, settings=settings, fused=fused))
    service = GatewayService(table, open_desk(settings), open_inputs(settings), settings)
    endpoint = Endpoint(DESCRIPTOR, service, settings.gateway_max_in_flight, settings.max_watchers)
    plane = DataPlane(endpoint, settings.gateway_max_message_bytes)
    await plane.start(settings.gateway_address)
    loops = [
        asyncio.create_task(keep_health(service, plane)),
        asyncio.create_task(_follow(keeper, Pointers(references, settings, found), settings)),
    ]
    try:
        await _started(table)
        async with web.serving(service.sessions, settings), _drained(plane, settings), _working(endpoint, settings):
            yield plane
    finally:
        for loop in loops:
            loop.cancel()
        await service.close()
        await keeper.close()


async def _started(table: ModelTable) -> None:
    """Return when the models are served. Raises Unavailable when none of them can be."""
    while not table.settled:  # noqa: ASYNC110 - a table tells of nothing by itself
        await asyncio.sleep(_LOOK_S)
    if not table.entries:
        raise Unavailable(table.listing()[0].status.error)


async def _follow(keeper: Keeper, pointers: Pointers, settings: ServingSettings) -> None:
    """Serve what the references mean, for as long as the server runs."""
    while True:
        try:
            keeper.follow(_plan(pointers.all))
            await pointers.look()
        except Exception:
            logger.exception("a look at the models failed")
        await asyncio.sleep(settings.models_watch_s)


def _plan(pointers: Sequence[Pointer]) -> Plan:
    """Each one's newest bundle; what is served meanwhile the one gateway has."""
    return tuple(Wanted(pointer.reference, _version(pointer), error=pointer.error) for pointer in pointers)


def _version(pointer: Pointer) -> Version | None:
    if pointer.found is None:
        return None
    model = served_model(pointer.found.manifest)
    return Version(application_name(model, "local"), pointer.found.source, model)


@contextlib.asynccontextmanager
async def _drained(plane: DataPlane, settings: ServingSettings) -> AsyncIterator[None]:
    """At the end the calls in flight are answered, and the streams told."""
    try:
        yield
    finally:
        await plane.drain(settings.drain_s)


async def _open(version: Version, cache: ByteCache, settings: ServingSettings, fused: bool) -> Entry:
    """The rooms of a bundle. One that is no longer wanted before it is loaded is closed when it is."""
    loading = asyncio.create_task(asyncio.to_thread(_load, version, settings, fused))
    try:
        rooms, stages = await asyncio.shield(loading)
    except asyncio.CancelledError:
        loading.add_done_callback(_discard)
        raise
    text, denoiser, images, *guided = stages

    async def close() -> None:
        _close(rooms)

    return Entry(version.application, version.model, Chain(text, denoiser, images, cache, *guided), close)


def _discard(loading: "asyncio.Task[_Room]") -> None:
    """Rooms that nobody waits for."""
    if not loading.cancelled() and loading.exception() is None:
        _close(loading.result()[0])


def _close(rooms: Sequence[StageService]) -> None:
    for room in rooms:
        room.close()


def _load(version: Version, settings: ServingSettings, fused: bool) -> _Room:
    """A bundle's rooms and their stages: text encoder, U-Net, decoder, and the ControlNets' if it has any."""
    folder, manifest = registry.open_model(version.source, settings)
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
