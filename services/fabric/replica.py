"""The base of every Serve deployment: it announces its address, reports health and load, and drains.

Serve is the control plane and calls these methods; the calls that carry images come in by the data plane beside it.
Each replica's `__init__` is the composition root of its process.
"""

import asyncio
import gc
import os
from pathlib import Path
from typing import ClassVar, Protocol

from google.protobuf.descriptor import ServiceDescriptor

from sdxs import registry
from sdxs.errors import CorruptArtifact, Unavailable
from services.fabric.endpoint import Endpoint
from services.fabric.loras import ReplicaLoras
from services.fabric.peers import Address
from services.fabric.server import DataPlane
from services.settings import ServingSettings

ANY_HOST = ("0.0.0.0", "[::]", "")  # noqa: S104 - compared with, not listened on


class StageService(Protocol):
    """A room's service as its replica sees it."""

    async def warm(self) -> None:
        """Compute once, so that the first caller does not wait."""
        ...

    def close(self) -> None:
        """Let the device's thread end."""
        ...


class Replica:
    """One replica of a room. A subclass's `__init__` builds the room and awaits `open`."""

    _plane: DataPlane | None = None
    _needed = False

    async def open(
        self,
        endpoint: Endpoint,
        listen: str,
        settings: ServingSettings,
        model_digest: str,
        max_message_bytes: int,
        lines: bool = False,
    ) -> DataPlane:
        """Start the data plane on `host:port`, not yet SERVING; with `lines` for other replicas."""
        self._endpoint = endpoint
        self._drain_s = settings.drain_s
        plane = DataPlane(endpoint, max_message_bytes, lines)
        await plane.start(listen)
        host, _, port = plane.address.rpartition(":")
        reachable = f"{node_address()}:{port}" if host in ANY_HOST else plane.address
        self._address = Address(reachable, model_digest, os.getpid(), node_id())
        self._plane = plane
        return plane

    async def addr(self) -> Address:
        """Where the data plane listens; peers ask by `handle.broadcast("addr")`."""
        if self._plane is None:
            raise Unavailable("the data plane is not open")
        return self._address

    async def awake(self) -> None:
        """Called while the replica's model is asked for; see services.gateway.waking."""
        self._needed = True

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load Serve cannot see, for services.fabric.scaling."""
        needed, self._needed = self._needed, False
        return {"in_flight": self._endpoint.load(), "needed": float(needed)}

    async def __del__(self) -> None:
        """Serve calls this when it stops the replica."""
        plane, self._plane = self._plane, None
        if plane is not None:
            await plane.drain(self._drain_s)


class StageReplica(Replica):
    """A replica that computes one stage of a bundle. A subclass says which."""

    descriptor: ClassVar[ServiceDescriptor]
    _service: StageService | None = None
    _metrics: "asyncio.Task[None] | None" = None

    def load(self, folder: Path, model_digest: str, settings: ServingSettings) -> StageService:
        """The room's service over the bundle in `folder`."""
        raise NotImplementedError

    async def __init__(self, model: str, model_digest: str) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = ServingSettings()
        if not settings.torch_device:  # others' GPUs may be visible too
            settings = settings.model_copy(update={"torch_device": granted_device()})
        gc.disable()  # importing torch makes millions of objects that stay: collecting among them is a tenth of the start
        folder, manifest = await asyncio.to_thread(registry.open_model, model, settings)
        if manifest.digest != model_digest:
            raise CorruptArtifact(f"{model} is {manifest.digest}, and was {model_digest} when its replicas were asked for")
        self._service = service = await asyncio.to_thread(self.load, folder, manifest.digest, settings)
        await service.warm()
        gc.freeze()
        gc.enable()
        endpoint = Endpoint(self.descriptor, service, settings.max_in_flight)
        limit = settings.max_message_bytes
        plane = await self.open(endpoint, f"{node_address()}:0", settings, manifest.digest, limit, lines=True)
        self._tell_of_loras(getattr(service, "loras", None))
        await plane.set_serving(True)

    def _tell_of_loras(self, loras: ReplicaLoras | None) -> None:
        """Of the stages that have some."""
        if loras is not None:
            from services.fabric.lora_metrics import LoraMetrics  # here: it imports ray

            self._metrics = asyncio.create_task(LoraMetrics(loras).export())

    async def __del__(self) -> None:
        """After the calls in flight the thread."""
        if self._metrics is not None:
            self._metrics.cancel()
        await super().__del__()
        if self._service is not None:
            self._service.close()


def node_address() -> str:
    """The address other nodes reach this one by, as Ray knows it."""
    import ray.util

    return str(ray.util.get_node_ip_address())


def granted_device() -> str:
    """Where this replica may compute: on the GPU that Ray gave it, if it did."""
    import ray

    return "cuda" if ray.get_gpu_ids() else "cpu"


def node_id() -> str:
    """Ray's id of this node; empty outside a cluster."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
