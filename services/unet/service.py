"""sdxs.v1.UNetService over a bundle's U-Net."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxs import tensors
from sdxs.noise import MAX_IMAGES
from sdxs.prompts import Prompts
from sdxs.sizes import Size
from sdxs.v1 import unet_pb2
from services.fabric import denoising
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline
from services.fabric.denoising import Facts, Image
from services.fabric.loras import replica_loras
from services.fabric.times import software, spent
from services.settings import ServingSettings
from services.unet.receiving import Receiver, Shape, residual_shapes, together

if TYPE_CHECKING:
    from sdxs.stages import ControlNets, UNet

DESCRIPTOR = unet_pb2.DESCRIPTOR.services_by_name["UNetService"]


@dataclasses.dataclass(frozen=True)
class _Done:
    """One image's latent, the batch it was computed in, and that of its ControlNets, where that was here."""

    latent_CHW: tensors.Array
    batch: int
    controlnet_batch: int


class UNetService:
    """Batches images of one size and the same LoRAs across requests, whatever their ControlNets; the noise of each follows from its seed.

    With `controlnets` it hosts them too (placement `fused`); without, residuals come with the request.
    """

    def __init__(self, unet: "UNet", facts: Facts, settings: ServingSettings, controlnets: "ControlNets | None" = None) -> None:
        from services.fabric.device_handover import borrower_of  # here: it imports torch

        self._unet = unet
        self._facts = facts
        self._controlnets = controlnets
        self._receiver = Receiver(borrower_of(settings))
        self._software = software(settings)
        self._batcher = GreedyBatcher(
            self._compute, settings.max_batch, settings.max_in_flight * MAX_IMAGES, lambda image: (image.size, image.loras)
        )
        self.loras = replica_loras("unet", unet.adapters, self._batcher.between, settings)

    def close(self) -> None:
        """After the last call."""
        self.loras.close()
        self._batcher.close()
        self._receiver.close()

    async def warm(self) -> None:
        """Pay for the first forward pass now."""
        await self.denoise(denoising.warming(self._facts), Deadline())

    async def denoise(self, request: unet_pb2.DenoiseRequest, deadline: Deadline) -> unet_pb2.DenoiseResponse:
        """[images, channels, height, width] float. Raises InvalidRequest that names the field at fault."""
        deadline.remaining()
        images = denoising.read(request, self._facts)
        conditions = await denoising.prepare(request.controls, self._controlnets, images[0].size)
        async with self.loras.hold(request.loras) as loras:
            residuals = await self._receiver.read(request, self._shapes(images[0].size))
            images = [
                dataclasses.replace(image, conditions=conditions, residuals=given, loras=loras)
                for image, given in zip(images, residuals, strict=True)
            ]
            computed = await self._batcher.submit(images, request.deterministic, deadline)
        return unet_pb2.DenoiseResponse(
            latent=tensors.encode(np.stack([done.result.latent_CHW for done in computed])),
            model_digest=self._facts.digest,
            batch=max(done.result.batch for done in computed),
            controlnet_batch=max(done.result.controlnet_batch for done in computed),
            times=[spent("unet", computed, self._software)],
        )

    def _compute(self, images: Sequence[Image]) -> Sequence[_Done]:
        """One forward pass; all images are of one size and have the same LoRAs."""
        noise_BCHW = denoising.noise(images, self._facts)
        added, batches = [image.residuals for image in images], [0] * len(images)
        if self._controlnets is not None:
            guided = denoising.guide(images, noise_BCHW, self._controlnets)
            added = [here.residuals or given for here, given in zip(guided, added, strict=True)]
            batches = [here.batch for here in guided]
        prompts, inits = Prompts.stack([image.prompt for image in images]), [image.init for image in images]
        with self._unet.adapters.use(images[0].loras):
            latents = self._unet.denoise(noise_BCHW, prompts, together(added, self._shapes(images[0].size)), inits)
        return [_Done(latent, len(images), batch) for latent, batch in zip(latents, batches, strict=True)]

    def _shapes(self, size: Size) -> tuple[Shape, ...]:
        """Of the residuals of an image."""
        return residual_shapes(self._unet.network, self._facts.latent_of(size))


def load(folder: Path, model_digest: str, settings: ServingSettings, fused: bool = False) -> UNetService:
    """The service over the bundle in `folder`, with its ControlNets when `fused`; imports torch."""
    from sdxs.stages import ControlNets, UNet

    controlnets = ControlNets.from_bundle(folder, settings) if fused else None
    return UNetService(UNet.from_bundle(folder, settings), Facts.of(folder, model_digest), settings, controlnets)
