"""sdxs.v1.DecoderService over a bundle's image decoder."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxs import images, tensors
from sdxs.errors import InvalidRequest
from sdxs.noise import MAX_IMAGES
from sdxs.v1 import decoder_pb2, unet_pb2
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline
from services.settings import ServingSettings

if TYPE_CHECKING:
    from sdxs.stages import Decoder

DESCRIPTOR = decoder_pb2.DESCRIPTOR.services_by_name["DecoderService"]


class DecoderService:
    """Batches latents across requests; encodes the images beside the device's thread, not in it."""

    def __init__(self, decoder: "Decoder", model_digest: str, settings: ServingSettings) -> None:
        self._decoder = decoder
        self._model_digest = model_digest
        self._batcher = GreedyBatcher(self._compute, settings.max_batch, max_waiting=settings.max_in_flight * MAX_IMAGES)

    def close(self) -> None:
        """After the last call."""
        self._batcher.close()

    async def warm(self) -> None:
        """Pay for the first forward pass and the first encoding now."""
        latent = tensors.encode(np.zeros((1, *self._decoder.latent_shape), np.float32))
        denoised = unet_pb2.DenoiseResponse(latent=latent, model_digest=self._model_digest)
        await self.decode(decoder_pb2.DecodeRequest(latent=denoised), Deadline())

    async def decode(self, request: decoder_pb2.DecodeRequest, deadline: Deadline) -> decoder_pb2.DecodeResponse:
        """One file per latent. Raises InvalidRequest that names the field at fault."""
        deadline.remaining()
        if request.latent.model_digest != self._model_digest:
            raise InvalidRequest("latent.model_digest", request.latent.model_digest, self._model_digest)
        latent_BCHW = tensors.decode(request.latent.latent, "latent.latent", (None, *self._decoder.latent_shape))
        if not 1 <= len(latent_BCHW) <= MAX_IMAGES:
            raise InvalidRequest("latent.latent.shape", list(latent_BCHW.shape), f"1 to {MAX_IMAGES} latents")
        if not np.isfinite(latent_BCHW).all():
            raise InvalidRequest("latent.latent.data", "not a number or infinite", "finite numbers")
        computed = await self._batcher.submit(list(latent_BCHW), alone=request.deterministic)
        receipts = [*request.receipts, *[""] * len(computed)]
        files = await asyncio.gather(
            *(
                asyncio.to_thread(_encode, done.result, request.format, receipt)
                for done, receipt in zip(computed, receipts, strict=False)
            )
        )
        batch = max(done.batch for done in computed)
        return decoder_pb2.DecodeResponse(images=files, batch=batch, unet_batch=request.latent.batch)

    def _compute(self, latents: Sequence[tensors.Array]) -> Sequence[tensors.Array]:
        """One forward pass."""
        return list(self._decoder.decode(np.stack(latents)))


def load(folder: Path, model_digest: str, settings: ServingSettings) -> DecoderService:
    """The service over the bundle in `folder`; imports torch."""
    from sdxs.stages import Decoder

    return DecoderService(Decoder.from_bundle(folder, settings), model_digest, settings)


def _encode(image_HWC: tensors.Array, image_format: int, receipt: str) -> decoder_pb2.Image:
    """One file."""
    height, width, _ = image_HWC.shape
    chosen = image_format or decoder_pb2.IMAGE_FORMAT_JPEG
    data = images.encode(image_HWC, chosen, receipt)
    return decoder_pb2.Image(data=data, format=decoder_pb2.ImageFormat.Name(chosen), width=width, height=height)
