"""The U-Net as a Ray Serve deployment."""

from pathlib import Path

from services.fabric.replica import StageReplica
from services.settings import ServingSettings
from services.unet.service import DESCRIPTOR, UNetService, load


class UNetReplica(StageReplica):
    """Loads the U-Net of one bundle; when `fused` its ControlNets too, and nothing else of it."""

    descriptor = DESCRIPTOR

    async def __init__(self, model: str, model_digest: str, fused: bool = False) -> None:  # type: ignore[misc]  # Serve awaits it
        self._fused = fused
        await super().__init__(model, model_digest)

    def load(self, folder: Path, model_digest: str, settings: ServingSettings) -> UNetService:
        """See StageReplica."""
        return load(folder, model_digest, settings, self._fused)
