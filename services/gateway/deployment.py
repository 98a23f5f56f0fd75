"""The gateway as a Ray Serve deployment."""

import asyncio
import logging
from typing import Any

from sdxs import registry
from services.fabric.discovery import replicas
from services.fabric.endpoint import Endpoint
from services.fabric.replica import Replica
from services.gateway.chain import Chain, PromptCache
from services.gateway.desk import open_desk
from services.gateway.health import keep_health
from services.gateway.inputs import open_inputs
from services.gateway.metrics import GatewayMetrics
from services.gateway.service import DESCRIPTOR, GatewayService, served_model
from services.gateway.web import WebServer
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_STAGES = ("TextEncoderService", "UNetService", "DecoderService", "ControlNetService")


class GatewayReplica(Replica):
    """The way in: its own gRPC server on a fixed port, peers learnt from the stages' handles; the last, ControlNets, may be missing."""

    async def __init__(self, model: str, *stages: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = ServingSettings()
        _, manifest = await asyncio.to_thread(registry.open_model, model, settings)
        self._peers = [
            replicas(f"sdxs.v1.{name}", handle, manifest.digest, settings)
            for name, handle in zip(_STAGES, stages, strict=False)
        ]
        text, unet, decoder, *controlnet = self._peers
        for peers in self._peers:
            peers.open()
        served = served_model(manifest)
        cache = PromptCache(settings.prompt_cache_bytes)
        chain = Chain(text, unet, decoder, cache, *controlnet)
        self._service = service = GatewayService(
            {served.name: served}, {served.name: chain}, open_desk(settings), open_inputs(settings), settings
        )
        endpoint = Endpoint(DESCRIPTOR, service, settings.gateway_max_in_flight, settings.max_watchers)
        limit = settings.gateway_max_message_bytes
        plane = await self.open(endpoint, settings.gateway_address, settings, manifest.digest, limit)
        self._health = asyncio.create_task(keep_health(service, plane))
        self._metrics = asyncio.create_task(GatewayMetrics(service.sessions, cache).export())
        self._web = WebServer(service.sessions, settings)
        if settings.gateway_http_address:
            await self._web.start(settings.gateway_http_address)

    def check_health(self) -> None:
        """Serve replaces a gateway that no longer watches its stages."""
        if self._health.done():
            raise RuntimeError("the gateway's health loop has ended")

    async def __del__(self) -> None:
        """Stop: health first, then the calls in flight and the streams, then the channels."""
        self._health.cancel()
        self._metrics.cancel()
        await super().__del__()
        await self._web.stop()
        await self._service.close()
        for peers in self._peers:
            await peers.close()
