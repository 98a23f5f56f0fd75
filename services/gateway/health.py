"""SERVING only while images can be drawn; what that takes, services.gateway.table knows."""

import asyncio
import logging
from typing import Protocol

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1


class _Service(Protocol):
    @property
    def ready(self) -> bool: ...


class _Plane(Protocol):
    async def set_serving(self, serving: bool) -> None: ...


async def keep_health(service: _Service, plane: _Plane) -> None:
    """Run for as long as the gateway does."""
    serving = False
    while True:
        if service.ready != serving:
            serving = service.ready
            logger.info("SERVING" if serving else "NOT_SERVING")
            await plane.set_serving(serving)
        await asyncio.sleep(_PAUSE_S)
