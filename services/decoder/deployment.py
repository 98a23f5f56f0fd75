"""The image decoder as a Ray Serve deployment."""

from pathlib import Path

from services.decoder.service import DESCRIPTOR, DecoderService, load
from services.fabric.replica import StageReplica
from services.settings import ServingSettings


class DecoderReplica(StageReplica):
    """Loads the image decoder of one bundle and nothing else of it."""

    descriptor = DESCRIPTOR

    def load(self, folder: Path, model_digest: str, settings: ServingSettings) -> DecoderService:
        """See StageReplica."""
        return load(folder, model_digest, settings)
