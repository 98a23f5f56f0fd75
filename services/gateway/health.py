"""SERVING only while every stage can answer: after a first image has gone through, until a stage has no replica."""

import asyncio
import logging
from typing import Protocol

from sdxs.errors import SdxsError

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1


class _Service(Protocol):
    @property
    def ready(self) -> bool: ...

    async def warm(self) -> None: ...


class _Plane(Protocol):
    async def set_serving(self, serving: bool) -> None: ...


async def keep_health(service: _Service, plane: _Plane) -> None:
    """Run for as long as the gateway does."""
    serving = False
    while True:
        now = service.ready and (serving or await _answers(service))
        if now != serving:
            serving = now
            logger.info("SERVING" if serving else "NOT_SERVING")
            await plane.set_serving(serving)
        await asyncio.sleep(_PAUSE_S)


async def _answers(service: _Service) -> bool:
    """Whether an image goes through all stages."""
    try:
        await service.warm()
    except SdxsError as error:
        logger.info("not warm yet: %s", error)
        return False
    return True
