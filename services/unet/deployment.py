"""The U-Net as a Ray Serve deployment."""

from pathlib import Path

from services.fabric.replica import StageReplica
from services.settings import ServingSettings
from services.unet.service import DESCRIPTOR, UNetService, load


class UNetReplica(StageReplica):
    """Loads the U-Net of one bundle and nothing else of it."""

    descriptor = DESCRIPTOR

    def load(self, folder: Path, model_digest: str, settings: ServingSettings) -> UNetService:
        """See StageReplica."""
        return load(folder, model_digest, settings)
