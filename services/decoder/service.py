"""sdxs.v1.DecoderService over a bundle's image decoder, and its encoder for image to image."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxs import bundle, control, images, sizes, tensors
from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.noise import MAX_IMAGES
from sdxs.sizes import Size
from sdxs.v1 import decoder_pb2, unet_pb2
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline
from services.fabric.times import software, spent
from services.settings import ServingSettings

if TYPE_CHECKING:
    from sdxs.stages import Decoder, Encoder

logger = logging.getLogger(__name__)

DESCRIPTOR = decoder_pb2.DESCRIPTOR.services_by_name["DecoderService"]


class DecoderService:
    """Batches latents of one shape across requests; encodes the images beside the device's thread, not in it."""

    def __init__(
        self,
        decoder: "Decoder",
        model_digest: str,
        image_size: int,
        settings: ServingSettings,
        encoder: "Encoder | None" = None,
    ) -> None:
        self._decoder = decoder
        self._encoder = encoder
        self._image_size, self._upsampling = image_size, image_size // decoder.latent_shape[1]
        self._encoding = GreedyBatcher(self._latent, max_batch=1, max_waiting=settings.max_in_flight)
        self._model_digest = model_digest
        self._software = software(settings)
        self._batcher = GreedyBatcher(
            self._compute, settings.max_batch, settings.max_in_flight * MAX_IMAGES, lambda latent_CHW: latent_CHW.shape
        )

    def close(self) -> None:
        """After the last call."""
        self._batcher.close()
        self._encoding.close()

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
        latent_BCHW = tensors.decode(request.latent.latent, "latent.latent", (None, self._decoder.latent_shape[0], None, None))
        height, width = (self._upsampling * side for side in latent_BCHW.shape[2:])
        try:
            sizes.chosen(width, height, self._image_size, self._upsampling)
        except InvalidRequest as error:
            raise InvalidRequest("latent.latent.shape", list(latent_BCHW.shape), f"one of images with {error}") from None
        if not 1 <= len(latent_BCHW) <= MAX_IMAGES:
            raise InvalidRequest("latent.latent.shape", list(latent_BCHW.shape), f"1 to {MAX_IMAGES} latents")
        if not np.isfinite(latent_BCHW).all():
            raise InvalidRequest("latent.latent.data", "not a number or infinite", "finite numbers")
        computed = await self._batcher.submit(list(latent_BCHW), request.deterministic, deadline)
        receipts = [*request.receipts, *[""] * len(computed)]
        files = await asyncio.gather(
            *(
                asyncio.to_thread(_encode, done.result, request.format, receipt)
                for done, receipt in zip(computed, receipts, strict=False)
            )
        )
        before = request.latent
        return decoder_pb2.DecodeResponse(
            images=files,
            batch=max(done.batch for done in computed),
            unet_batch=before.batch,
            controlnet_batch=before.controlnet_batch,
            times=[*before.times, spent("decoder", computed, self._software)],
        )

    async def encode_image(
        self, request: decoder_pb2.EncodeImageRequest, deadline: Deadline
    ) -> decoder_pb2.EncodeImageResponse:
        """The init image's latent; each is computed alone. Raises InvalidRequest(field="init_image"), PreconditionFailed."""
        deadline.remaining()
        if self._encoder is None:
            raise PreconditionFailed("this model has no image encoder, so it makes no images from images")
        size = sizes.chosen(request.width, request.height, self._image_size, self._upsampling)
        image_HWC = await asyncio.to_thread(_fitted, request.init_image, size)
        [computed] = await self._encoding.submit([image_HWC], deadline=deadline)
        time, latent = spent("image_encoder", [computed], self._software), tensors.encode(computed.result)
        return decoder_pb2.EncodeImageResponse(latent=latent, model_digest=self._model_digest, time=time)

    def _latent(self, images: Sequence[tensors.Array]) -> Sequence[tensors.Array]:
        """One forward pass."""
        assert self._encoder is not None
        return list(self._encoder.encode(np.stack(images)))

    def _compute(self, latents: Sequence[tensors.Array]) -> Sequence[tensors.Array]:
        """One forward pass."""
        return list(self._decoder.decode(np.stack(latents)))


def load(folder: Path, model_digest: str, settings: ServingSettings) -> DecoderService:
    """The service over the bundle in `folder`; imports torch."""
    from sdxs.stages import Decoder, Encoder

    try:
        encoder = Encoder.from_bundle(folder, settings)
    except PreconditionFailed as error:  # a student's decoder may come alone
        logger.info("%s", error)
        encoder = None
    size = bundle.facts(folder).image_size
    return DecoderService(Decoder.from_bundle(folder, settings), model_digest, size, settings, encoder)


def _fitted(data: bytes, size: Size) -> tensors.Array:
    """The file's pixels at that size. Raises InvalidRequest(field="init_image")."""
    return control.fit(control.read_image(data, "init_image"), size.height, size.width)


def _encode(image_HWC: tensors.Array, image_format: int, receipt: str) -> decoder_pb2.Image:
    """One file."""
    height, width, _ = image_HWC.shape
    chosen = image_format or decoder_pb2.IMAGE_FORMAT_JPEG
    data = images.encode(image_HWC, chosen, receipt)
    return decoder_pb2.Image(data=data, format=decoder_pb2.ImageFormat.Name(chosen), width=width, height=height)
