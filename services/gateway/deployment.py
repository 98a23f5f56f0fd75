"""The gateway as a Ray Serve deployment."""

import asyncio
import functools
import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from services.fabric.discovery import replicas
from services.fabric.endpoint import Endpoint
from services.fabric.models import Plan, Version
from services.fabric.peers import PeerSet
from services.fabric.replica import Replica
from services.gateway.cache import ByteCache
from services.gateway.chain import Chain
from services.gateway.desk import open_desk
from services.gateway.health import keep_health
from services.gateway.inputs import open_inputs
from services.gateway.keeper import Keeper
from services.gateway.loras import open_loras
from services.gateway.metrics import GatewayMetrics
from services.gateway.service import DESCRIPTOR, GatewayService
from services.gateway.table import Entry, ModelTable
from services.gateway.waking import Waker
from services.gateway.web import WebServer
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_SERVICES = ("TextEncoderService", "UNetService", "DecoderService", "ControlNetService")  # in the order of Version.stages
_ASK_S, _ANSWER_S = 0.5, 10.0


class GatewayReplica(Replica):
    """The way in: its own gRPC server on a fixed port. The control room tells it what to serve, the stages' handles where."""

    async def __init__(self, room: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = ServingSettings()
        cache = ByteCache(settings.prompt_cache_bytes)
        table = ModelTable(settings.max_image_bytes, open_loras(settings))
        self._room = room
        self._keeper = Keeper(table, functools.partial(open_version, cache=cache, settings=settings))
        self._service = service = GatewayService(table, open_desk(settings), open_inputs(settings), settings)
        endpoint = Endpoint(DESCRIPTOR, service, settings.gateway_max_in_flight, settings.max_watchers)
        limit = settings.gateway_max_message_bytes
        plane = await self.open(endpoint, settings.gateway_address, settings, "", limit)
        self._following = asyncio.create_task(self._follow())
        self._health = asyncio.create_task(keep_health(service, plane))
        self._metrics = asyncio.create_task(GatewayMetrics(service.sessions, cache).export())
        self._web = WebServer(service.sessions, settings)
        if settings.gateway_http_address:
            await self._web.start(settings.gateway_http_address)

    async def _follow(self) -> None:
        """Ask the control room what to serve, for as long as the gateway runs; without an answer all stays as it is."""
        while True:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    plan: Plan | None = await self._room.follow.remote(self._keeper.report())
            except Exception as error:
                logger.warning("the control room does not answer: %r", error)
            else:
                if plan is not None:  # one that has just begun knows none yet
                    self._keeper.follow(plan)
            await asyncio.sleep(_ASK_S)

    def check_health(self) -> None:
        """Serve replaces a gateway that no longer watches its stages or follows its plan."""
        if self._health.done() or self._following.done():
            raise RuntimeError("a loop of the gateway has ended")

    async def __del__(self) -> None:
        """Stop: health first, then the calls in flight and the streams, then the channels."""
        for task in (self._health, self._metrics, self._following):
            task.cancel()
        await super().__del__()
        await self._web.stop()
        await self._service.close()
        await self._keeper.close()


async def open_version(version: Version, cache: ByteCache, settings: ServingSettings) -> Entry:
    """Channels to the replicas of a bundle, which need not be there yet. Handles are made here: Serve's own cache would give those that
    were closed when the same bundle was served before."""
    handles: list[Any] = [DeploymentHandle(stage, version.application) for stage in version.stages]
    peers = [
        replicas(f"sdxs.v1.{service}", handle, version.model.digest, settings, hurried=not version.sleeps)
        for service, handle in zip(_SERVICES, handles, strict=False)
    ]
    text, unet, decoder, *controlnet = peers
    entry = Entry(version.application, version.model, Chain(text, unet, decoder, cache, *controlnet))
    rousing = [functools.partial(_rouse, handle, each) for handle, each in zip(handles, peers, strict=True)]
    waker = Waker(rousing, lambda: entry.in_use > 0) if version.sleeps else None

    async def close() -> None:
        if waker is not None:
            await waker.close()
        await asyncio.gather(*(each.close() for each in peers))
        await asyncio.gather(*(handle.shutdown_async() for handle in handles), return_exceptions=True)

    entry.waker, entry.closing = waker, close
    for each in peers:
        each.open()
    return entry


async def _rouse(handle: Any, peers: PeerSet) -> None:
    """Wait for a replica of a stage that may sleep, and see to it that it is known."""
    await handle.awake.remote()
    if not peers.ready:
        peers.look()
