"""The ControlNets as a Ray Serve deployment."""

from pathlib import Path
from typing import Any

from services.controlnet.service import DESCRIPTOR, ControlNetService, load
from services.fabric.discovery import replicas
from services.fabric.peers import PeerSet
from services.fabric.replica import StageReplica, node_id
from services.settings import ServingSettings


class ControlNetReplica(StageReplica):
    """Loads the ControlNets of one bundle and nothing else of it; calls U-Net replicas, those of its own node first."""

    descriptor = DESCRIPTOR
    _unets: PeerSet

    async def __init__(self, model: str, model_digest: str, unet: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        self._handle = unet
        await super().__init__(model, model_digest)
        self._unets.open()

    def load(self, folder: Path, model_digest: str, settings: ServingSettings) -> ControlNetService:
        """See StageReplica."""
        node = node_id()
        self._unets = replicas("sdxs.v1.UNetService", self._handle, model_digest, settings, near=node)
        return load(folder, model_digest, settings, self._unets, node)

    async def __del__(self) -> None:
        """After the calls in flight the channels."""
        await super().__del__()
        await self._unets.close()
