"""The image decoder as a Ray Serve deployment."""

from pathlib import Path
from typing import Any

from services.decoder.service import DESCRIPTOR, DecoderService, load
from services.fabric.replica import StageReplica
from services.settings import ServingSettings


class DecoderReplica(StageReplica):
    """Loads the image decoder of one bundle and nothing else of it.

    It is also what Serve calls the ingress of a bundle's application, from which all other deployments must be reachable: hence `others`.
    """

    descriptor = DESCRIPTOR

    async def __init__(self, model: str, model_digest: str, *others: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        await super().__init__(model, model_digest)

    def load(self, folder: Path, model_digest: str, settings: ServingSettings) -> DecoderService:
        """See StageReplica."""
        return load(folder, model_digest, settings)
