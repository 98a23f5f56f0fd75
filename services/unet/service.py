"""sdxs.v1.UNetService over a bundle's U-Net."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxs import tensors
from sdxs.noise import MAX_IMAGES
from sdxs.prompts import Prompts
from sdxs.v1 import unet_pb2
from services.fabric import denoising
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline
from services.fabric.denoising import Facts, Image
from services.fabric.times import software, spent
from services.settings import ServingSettings
from services.unet.receiving import Receiver, residual_shapes, together

if TYPE_CHECKING:
    from sdxs.stages import ControlNets, UNet

DESCRIPTOR = unet_pb2.DESCRIPTOR.services_by_name["UNetService"]


@dataclasses.dataclass(frozen=True)
class _Done:
    """One image's latent, and the batch its ControlNets were computed in, where that was here."""

    latent_CHW: tensors.Array
    controlnet_batch: int


class UNetService:
    """Batches images across requests, those of different ControlNets or none included; the noise of each follows from its seed.

    With `controlnets` it hosts them too (placement `fused`); without, residuals come with the request.
    """

    def __init__(self, unet: "UNet", facts: Facts, settings: ServingSettings, controlnets: "ControlNets | None" = None) -> None:
        from services.fabric.device_handover import borrower_of  # here: it imports torch

        self._unet = unet
        self._facts = facts
        self._controlnets = controlnets
        self._shapes = residual_shapes(unet.network, facts.latent_shape)
        self._receiver = Receiver(self._shapes, borrower_of(settings))
        self._software = software(settings)
        self._batcher = GreedyBatcher(self._compute, settings.max_batch, max_waiting=settings.max_in_flight * MAX_IMAGES)

    def close(self) -> None:
        """After the last call."""
        self._batcher.close()
        self._receiver.close()

    async def warm(self) -> None:
        """Pay for the first forward pass now."""
        await self.denoise(denoising.warming(self._facts), Deadline())

    async def denoise(self, request: unet_pb2.DenoiseRequest, deadline: Deadline) -> unet_pb2.DenoiseResponse:
        """[images, channels, height, width] float. Raises InvalidRequest that names the field at fault."""
        deadline.remaining()
        images = denoising.read(request, self._facts)
        conditions = await denoising.prepare(request.controls, self._controlnets, self._facts)
        residuals = await self._receiver.read(request)
        images = [
            dataclasses.replace(image, conditions=conditions, residuals=given)
            for image, given in zip(images, residuals, strict=True)
        ]
        computed = await self._batcher.submit(images, request.deterministic, deadline)
        return unet_pb2.DenoiseResponse(
            latent=tensors.encode(np.stack([done.result.latent_CHW for done in computed])),
            model_digest=self._facts.digest,
            batch=max(done.batch for done in computed),
            controlnet_batch=max(done.result.controlnet_batch for done in computed),
            times=[spent("unet", computed, self._software)],
        )

    def _compute(self, images: Sequence[Image]) -> Sequence[_Done]:
        """One forward pass."""
        noise_BCHW = denoising.noise(images, self._facts)
        added, batches = [image.residuals for image in images], [0] * len(images)
        if self._controlnets is not None:
            guided = denoising.guide(images, noise_BCHW, self._controlnets)
            added = [here.residuals or given for here, given in zip(guided, added, strict=True)]
            batches = [here.batch for here in guided]
        prompts = Prompts.stack([image.prompt for image in images])
        latents = self._unet.denoise(noise_BCHW, prompts, together(added, self._shapes), [image.init for image in images])
        return [_Done(latent, batch) for latent, batch in zip(latents, batches, strict=True)]


def load(folder: Path, model_digest: str, settings: ServingSettings, fused: bool = False) -> UNetService:
    """The service over the bundle in `folder`, with its ControlNets when `fused`; imports torch."""
    from sdxs.stages import ControlNets, UNet

    controlnets = ControlNets.from_bundle(folder, settings) if fused else None
    return UNetService(UNet.from_bundle(folder, settings), Facts.of(folder, model_digest), settings, controlnets)
