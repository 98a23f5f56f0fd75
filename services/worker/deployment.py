"""The job worker as a Ray Serve deployment."""

import asyncio
import contextlib
from typing import Any

from sdxs.store import open_store
from services.fabric.deadline import Deadline
from services.fabric.discovery import replicas
from services.fabric.jobs import open_queue
from services.settings import ServingSettings
from services.worker.service import JOB_PATIENCE, Worker


class WorkerReplica:
    """Takes jobs and has the gateways do them, as any client would. Nobody calls it, so it has no data plane."""

    async def __init__(self, gateway: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = ServingSettings()
        patient = settings.model_copy(update={"patience_s": JOB_PATIENCE * settings.job_visibility_s})
        self._gateways = replicas("sdxs.v1.GatewayService", gateway, "", patient)
        self._gateways.open()
        self._queue = open_queue(settings)
        self._worker = Worker(self._queue, lambda: open_store(settings, "artifacts"), self._generate, settings)
        self._running = asyncio.create_task(self._worker.run())
        self._drain_s = settings.drain_s

    async def _generate(self, request: bytes, deadline: Deadline) -> bytes:
        """One call to a gateway."""
        return await self._gateways.call("Generate", request, deadline)

    def check_health(self) -> None:
        """Serve replaces a worker whose loop has ended."""
        if self._running.done():
            raise RuntimeError("the worker's loop has ended")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load Serve cannot see, for services.fabric.scaling."""
        return {"queued": float(await self._queue.backlog())}

    async def __del__(self) -> None:
        """Finish the job in hand; what does not end in time goes to another worker."""
        self._worker.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await self._running
        await self._gateways.close()
        await self._queue.close()
