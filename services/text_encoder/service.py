"""sdxs.v1.TextEncoderService over a bundle's text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdxs import tensors
from sdxs.errors import InvalidRequest
from sdxs.prompts import Prompts
from sdxs.v1 import text_encoder_pb2
from services.fabric.batcher import GreedyBatcher
from services.fabric.deadline import Deadline
from services.fabric.loras import replica_loras
from services.fabric.times import software, spent
from services.settings import ServingSettings

if TYPE_CHECKING:
    from sdxs.lora.adapters import Use
    from sdxs.stages import TextEncoder

DESCRIPTOR = text_encoder_pb2.DESCRIPTOR.services_by_name["TextEncoderService"]


class TextEncoderService:
    """Each prompt is encoded alone: the gateway keeps the result, so its bits must not depend on who came at the same time."""

    def __init__(self, encoder: "TextEncoder", model_digest: str, settings: ServingSettings) -> None:
        self._encoder = encoder
        self._model_digest = model_digest
        self._software = software(settings)
        self._batcher = GreedyBatcher(self._compute, max_batch=1, max_waiting=settings.max_in_flight)
        self.loras = replica_loras("text_encoder", encoder.adapters, self._batcher.between, settings)

    def close(self) -> None:
        """After the last call."""
        self.loras.close()
        self._batcher.close()

    async def warm(self) -> None:
        """Pay for the first forward pass now."""
        await self.encode(text_encoder_pb2.EncodeRequest(prompt="warm"), Deadline())

    async def encode(self, request: text_encoder_pb2.EncodeRequest, deadline: Deadline) -> text_encoder_pb2.EncodeResponse:
        """[tokens, width] float, for SDXL also [width] of the prompt. Raises InvalidRequest(field="prompt"): empty or too long, and
        what `ReplicaLoras.hold` does."""
        if not request.prompt.strip():
            raise InvalidRequest("prompt", request.prompt, "some text")
        deadline.remaining()
        self._encoder.check(request.prompt)
        async with self.loras.hold(request.loras) as loras:
            [computed] = await self._batcher.submit([(request.prompt, loras)], deadline=deadline)
        time = spent("text_encoder", [computed], self._software)
        text_BLD, pooled_BD = computed.result.text_BLD, computed.result.pooled_BD
        pooled = None if pooled_BD is None else tensors.encode(pooled_BD[0])
        text = tensors.encode(text_BLD[0])
        return text_encoder_pb2.EncodeResponse(text=text, pooled=pooled, model_digest=self._model_digest, time=time)

    def _compute(self, asked: "Sequence[tuple[str, tuple[Use, ...]]]") -> Sequence[Prompts]:
        """One forward pass for one prompt."""
        [(prompt, loras)] = asked
        with self._encoder.adapters.use(loras):
            return self._encoder.encode([prompt]).rows()


def load(folder: Path, model_digest: str, settings: ServingSettings) -> TextEncoderService:
    """The service over the bundle in `folder`; imports torch."""
    from sdxs.stages import TextEncoder

    return TextEncoderService(TextEncoder.from_bundle(folder, settings), model_digest, settings)
