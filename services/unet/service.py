"""sdxs.v1.UNetService over a bundle's U-Net."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxs import tensors
from sdxs.errors import InvalidRequest
from sdxs.noise import MAX_IMAGES, latent_noise
from sdxs.prompts import Prompts
from sdxs.v1 import text_encoder_pb2, unet_pb2
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline
from services.settings import ServingSettings

if TYPE_CHECKING:
    from sdxs.stages import UNet

DESCRIPTOR = unet_pb2.DESCRIPTOR.services_by_name["UNetService"]


@dataclass(frozen=True)
class _Image:
    """What one image is computed from."""

    seed: int
    prompt: Prompts


class UNetService:
    """Batches images across requests; the noise of each follows from its seed alone."""

    def __init__(self, unet: "UNet", model_digest: str, settings: ServingSettings) -> None:
        self._unet = unet
        self._model_digest = model_digest
        self._batcher = GreedyBatcher(self._compute, settings.max_batch, max_waiting=settings.max_in_flight * MAX_IMAGES)

    def close(self) -> None:
        """After the last call."""
        self._batcher.close()

    async def warm(self) -> None:
        """Pay for the first forward pass now."""
        text = tensors.encode(np.zeros(self._unet.text_shape, np.float32))
        pooled = tensors.encode(np.zeros(self._unet.pooled_width, np.float32)) if self._unet.pooled_width else None
        encoded = text_encoder_pb2.EncodeResponse(text=text, pooled=pooled, model_digest=self._model_digest)
        await self.denoise(unet_pb2.DenoiseRequest(text=encoded, seeds=[0]), Deadline())

    async def denoise(self, request: unet_pb2.DenoiseRequest, deadline: Deadline) -> unet_pb2.DenoiseResponse:
        """[images, channels, height, width] float. Raises InvalidRequest that names the field at fault."""
        deadline.remaining()
        if not 1 <= len(request.seeds) <= MAX_IMAGES:
            raise InvalidRequest("seeds", len(request.seeds), f"1 to {MAX_IMAGES} seeds")
        if request.text.model_digest != self._model_digest:
            raise InvalidRequest("text.model_digest", request.text.model_digest, self._model_digest)
        prompt = self._prompt(request.text)
        images = [_Image(seed, prompt) for seed in request.seeds]
        computed = await self._batcher.submit(images, alone=request.deterministic)
        latent_BCHW = np.stack([done.result for done in computed])
        batch = max(done.batch for done in computed)
        return unet_pb2.DenoiseResponse(latent=tensors.encode(latent_BCHW), model_digest=self._model_digest, batch=batch)

    def _prompt(self, encoded: text_encoder_pb2.EncodeResponse) -> Prompts:
        """The message's one prompt. Raises InvalidRequest that names the tensor at fault."""
        text_LD = tensors.decode(encoded.text, "text.text", self._unet.text_shape)
        width = self._unet.pooled_width
        if not width:
            return Prompts(text_LD[None])
        if not encoded.HasField("pooled"):
            raise InvalidRequest("text.pooled", None, f"[{width}]: this model's U-Net takes a pooled embedding too")
        return Prompts(text_LD[None], tensors.decode(encoded.pooled, "text.pooled", (width,))[None])

    def _compute(self, images: Sequence[_Image]) -> Sequence[tensors.Array]:
        """One forward pass."""
        noise_BCHW = np.stack([latent_noise(image.seed, self._unet.latent_shape) for image in images])
        return list(self._unet.denoise(noise_BCHW, Prompts.stack([image.prompt for image in images])))


def load(folder: Path, model_digest: str, settings: ServingSettings) -> UNetService:
    """The service over the bundle in `folder`; imports torch."""
    from sdxs.stages import UNet

    return UNetService(UNet.from_bundle(folder, settings), model_digest, settings)
