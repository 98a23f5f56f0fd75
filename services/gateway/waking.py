"""Keeps the replicas of a model that may sleep awake while it is asked for, and has them started when there are none.

Serve starts the first replica of a stage when a call waits for one at a handle. The calls that carry images do not pass by there; so
while a model is used, each of its stages gets a small call now and then, all stages at once: those that are there know that they are needed
(services.fabric.scaling), also a text encoder whose prompts the gateway remembers, and those that are not are started side by side.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

logger = logging.getLogger(__name__)

_BEAT_S = 1.0
_PATIENCE_S = 600.0
"""For replicas that start, on nodes that may have to be started too."""

Call = Callable[[], Awaitable[object]]


class Waker:
    """Of one bundle.

    Args:
        stages: one small call to each; it waits while there is no replica.
        used: whether any call is on its way through them.
    """

    def __init__(self, stages: Sequence[Call], used: Callable[[], bool]) -> None:
        self._stages = stages
        self._used = used
        self._touched = asyncio.Event()
        self._waiting: dict[int, asyncio.Task[None]] = {}
        self._beating = asyncio.create_task(self._beat_forever())

    def touch(self) -> None:
        """Somebody asks for the model."""
        self._touched.set()

    async def close(self) -> None:
        """Nobody will."""
        tasks = [self._beating, *self._waiting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _beat_forever(self) -> None:
        while True:
            if not self._used():
                await self._touched.wait()
            self._touched.clear()
            for number, stage in enumerate(self._stages):
                if number not in self._waiting:
                    self._waiting[number] = asyncio.create_task(self._call(number, stage))
            await asyncio.sleep(_BEAT_S)

    async def _call(self, number: int, stage: Call) -> None:
        """One call; the next beat is another try."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await stage()
        except Exception as error:  # of any kind: it is Serve's
            logger.info("stage %d of a model does not wake: %s", number, error)
        finally:
            del self._waiting[number]
