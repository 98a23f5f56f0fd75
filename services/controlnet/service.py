"""sdxs.v1.ControlNetService over a bundle's ControlNets: what they add to the U-Net is computed here and handed to it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdxs.errors import InvalidRequest
from sdxs.noise import MAX_IMAGES
from sdxs.v1 import controlnet_pb2, unet_pb2
from services.controlnet.sending import Sender
from services.fabric import denoising
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline
from services.fabric.denoising import Facts, Guided, Image
from services.fabric.peers import Stage
from services.fabric.times import software, spent
from services.settings import ServingSettings

if TYPE_CHECKING:
    from sdxs.stages import ControlNets

DESCRIPTOR = controlnet_pb2.DESCRIPTOR.services_by_name["ControlNetService"]


class ControlNetService:
    """Batches images of one size across requests, grouped by ControlNet inside a batch."""

    def __init__(self, controlnets: "ControlNets", sender: Sender, facts: Facts, settings: ServingSettings) -> None:
        self._controlnets = controlnets
        self._sender = sender
        self._facts = facts
        self._software = software(settings)
        self._batcher = GreedyBatcher(
            self._compute, settings.max_batch, settings.max_in_flight * MAX_IMAGES, lambda image: image.size
        )

    def close(self) -> None:
        """After the last call."""
        self._batcher.close()
        self._sender.close()

    async def warm(self) -> None:
        """Pay for the first forward pass of each ControlNet now. Calls no U-Net."""
        [image] = denoising.read(denoising.warming(self._facts), self._facts)
        conditions = [denoising.blank(name, self._controlnets, self._facts) for name in self._controlnets.names]
        await self._batcher.submit([replace(image, conditions=(condition,)) for condition in conditions])

    async def denoise(self, request: unet_pb2.DenoiseRequest, deadline: Deadline) -> unet_pb2.DenoiseResponse:
        """The U-Net's answer. Raises InvalidRequest and NotFound that name the field at fault."""
        deadline.remaining()
        if request.WhichOneof("residuals") is not None:
            raise InvalidRequest("residuals", request.WhichOneof("residuals"), "none: they are computed here")
        images = denoising.read(request, self._facts)
        conditions = await denoising.prepare(request.controls, self._controlnets, images[0].size)
        del request.controls[:]
        if not conditions:
            return await self._sender.send(request, [], deadline)
        images = [replace(image, conditions=conditions) for image in images]
        computed = await self._batcher.submit(images, request.deterministic, deadline)
        rows = [done.result.residuals for done in computed if done.result.residuals is not None]
        response = await self._sender.send(request, rows, deadline)
        response.controlnet_batch = max(done.result.batch for done in computed)
        response.times.insert(0, spent("controlnet", computed, self._software))
        return response

    def _compute(self, images: Sequence[Image]) -> Sequence[Guided]:
        """One forward pass of each ControlNet that is asked for, to its end."""
        noise_BCHW = denoising.noise(images, self._facts)
        guided = denoising.guide(images, noise_BCHW, self._controlnets, keep=self._sender.on_device)
        self._controlnets.finish()
        return guided


def load(folder: Path, model_digest: str, settings: ServingSettings, unet: Stage, node: str) -> ControlNetService:
    """The service over the bundle in `folder`, on Ray's node of that id, before these U-Nets; imports torch."""
    from sdxs.stages import ControlNets
    from services.fabric.device_handover import lender_of

    sender = Sender(unet, node, settings.handover_bytes, settings.max_message_bytes, lender_of(settings))
    return ControlNetService(ControlNets.from_bundle(folder, settings), sender, Facts.of(folder, model_digest), settings)
