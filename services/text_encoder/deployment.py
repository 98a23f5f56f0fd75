"""The text encoder as a Ray Serve deployment."""

from pathlib import Path

from services.fabric.replica import StageReplica
from services.settings import ServingSettings
from services.text_encoder.service import DESCRIPTOR, TextEncoderService, load


class TextEncoderReplica(StageReplica):
    """Loads the text encoder of one bundle and nothing else of it."""

    descriptor = DESCRIPTOR

    def load(self, folder: Path, model_digest: str, settings: ServingSettings) -> TextEncoderService:
        """See StageReplica."""
        return load(folder, model_digest, settings)
