"""A request's way through the stages: text encoder, U-Net, decoder; with controls a ControlNet in front of the U-Net, with an init
image the encoder half of the decoder's network.

Stage messages are passed on as they came, without decoding them. Text embeddings are kept by prompt, and by the LoRAs that change
the text encoder.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdxs.errors import Internal, InvalidRequest, SdxsError
from sdxs.v1 import decoder_pb2, lora_pb2, stage_pb2, text_encoder_pb2, unet_pb2
from services.fabric.deadline import Deadline
from services.fabric.peers import Stage
from services.fabric.wire import embed
from services.gateway.cache import ByteCache
from services.gateway.checks import Order

logger = logging.getLogger(__name__)

_TEXT = unet_pb2.DenoiseRequest.TEXT_FIELD_NUMBER
_LATENT = decoder_pb2.DecodeRequest.LATENT_FIELD_NUMBER
_CALLERS = re.compile(r"prompt|init_image|strength|(controls|loras)(\[\d+\](\.\w+)?)?")
"""Fields that the caller wrote; all others are made by us."""


@dataclass(frozen=True)
class Latents:
    """An encoded DenoiseResponse, and what the stages before the U-Net spent on it."""

    encoded: bytes
    times: tuple[stage_pb2.StageTime, ...] = ()


@dataclass(frozen=True)
class Loras:
    """Those LoRAs of an order that change a stage, each with its place among all of the order's."""

    places: tuple[int, ...]
    uses: tuple[lora_pb2.LoraUse, ...]

    @classmethod
    def of(cls, order: Order, networks: Sequence[str]) -> "Loras":
        """Those of scale 0 change nothing."""
        found = [(i, lora) for i, lora in enumerate(order.loras) if lora.scale and not lora.networks.isdisjoint(networks)]
        uses = tuple(lora_pb2.LoraUse(digest=lora.digest, scale=lora.scale) for _, lora in found)
        return cls(tuple(i for i, _ in found), uses)

    @property
    def said(self) -> tuple[tuple[str, float], ...]:
        """For a cache."""
        return tuple((use.digest, use.scale) for use in self.uses)

    @property
    def affinity(self) -> str:
        """Calls with the same first LoRA had best go to the same replica."""
        return self.uses[0].digest if self.uses else ""

    def rename(self, error: SdxsError) -> None:
        """Have it blame the field that the caller wrote, where the stage blames one of its LoRAs."""
        if found := re.fullmatch(r"loras\[(\d+)\]", error.field):
            named = f"loras[{self.places[int(found[1])]}].name"
            error.args = (str(error).replace(f"{error.field}:", f"{named}:", 1),)
            error.field = named


class Chain:
    """The stages of one model. Without a `controlnet` stage controls go to the U-Net, which then hosts the ControlNets."""

    def __init__(
        self, text_encoder: Stage, unet: Stage, decoder: Stage, cache: ByteCache, controlnet: Stage | None = None
    ) -> None:
        self._text_encoder = text_encoder
        self._unet = unet
        self._decoder = decoder
        self._controlnet = controlnet or unet
        self._cache = cache

    @property
    def ready(self) -> bool:
        """Whether every stage has a replica."""
        return all(stage.ready for stage in (self._text_encoder, self._controlnet, self._unet, self._decoder))

    async def run(self, order: Order, receipts: Sequence[str], deadline: Deadline) -> decoder_pb2.DecodeResponse:
        """The order's images. Raises SdxsError."""
        return await self.decode(order, await self.denoise(order, deadline), receipts, deadline)

    async def denoise(self, order: Order, deadline: Deadline) -> Latents:
        """The order's latents: all up to the U-Net. Raises SdxsError."""
        times = list[stage_pb2.StageTime]()
        text = await self._encode(order, deadline, times)
        loras = Loras.of(order, ("unet",))
        options = unet_pb2.DenoiseRequest(
            seeds=order.seeds,
            deterministic=order.deterministic,
            controls=order.controls,
            loras=loras.uses,
            width=order.size.width,
            height=order.size.height,
        )
        if order.init_image:
            encoded = await self._encode_image(order, deadline)
            times.append(encoded.time)
            options.init_latent.CopyFrom(encoded.latent)
            options.strength = order.strength
        unet = self._controlnet if order.controls else self._unet
        latent = await _call(unet, "Denoise", embed(_TEXT, text) + options.SerializeToString(), deadline, loras)
        return Latents(latent, tuple(times))

    async def decode(
        self, order: Order, latents: Latents, receipts: Sequence[str], deadline: Deadline
    ) -> decoder_pb2.DecodeResponse:
        """The images of what `denoise` gave, with the times of all stages. Raises SdxsError."""
        wishes = decoder_pb2.DecodeRequest(format=order.format, deterministic=order.deterministic, receipts=receipts)
        request = embed(_LATENT, latents.encoded) + wishes.SerializeToString()
        made = decoder_pb2.DecodeResponse.FromString(await _call(self._decoder, "Decode", request, deadline))
        for place, time in enumerate(latents.times):
            made.times.insert(place, time)
        return made

    async def check_prompt(self, order: Order, deadline: Deadline) -> None:
        """Raises InvalidRequest(field="prompt") for what the text encoder would refuse."""
        await self._encode(order, deadline, [])

    async def _encode_image(self, order: Order, deadline: Deadline) -> decoder_pb2.EncodeImageResponse:
        """The init image's latent."""
        width, height = order.size
        request = decoder_pb2.EncodeImageRequest(init_image=order.init_image, width=width, height=height).SerializeToString()
        answer = await _call(self._decoder, "EncodeImage", request, deadline)
        return decoder_pb2.EncodeImageResponse.FromString(answer)

    async def _encode(self, order: Order, deadline: Deadline, times: list[stage_pb2.StageTime]) -> bytes:
        """An encoded EncodeResponse; what it took goes to `times`, unless it was there already."""
        loras = Loras.of(order, ("text_encoder", "text_encoder_2"))
        key = order.model.digest, order.prompt, loras.said
        encoded = self._cache.get(key)
        if encoded is None:
            request = text_encoder_pb2.EncodeRequest(prompt=order.prompt, loras=loras.uses).SerializeToString()
            encoded = await _call(self._text_encoder, "Encode", request, deadline, loras)
            self._cache.put(key, encoded)
            times.append(text_encoder_pb2.EncodeResponse.FromString(encoded).time)
        return encoded


async def _call(stage: Stage, name: str, payload: bytes, deadline: Deadline, loras: "Loras | None" = None) -> bytes:
    """One rpc of a stage. What it refuses in fields the caller wrote is the caller's fault; in any other it was made by us: Internal."""
    try:
        return await stage.call(name, payload, deadline, loras.affinity if loras is not None else "")
    except SdxsError as error:
        if loras is not None:
            loras.rename(error)
        if not isinstance(error, InvalidRequest):
            raise
        if _CALLERS.fullmatch(error.field):
            raise
        logger.error("%s refuses what it was given: %s", name, error)
        raise Internal("a stage refuses what the one before it made; the server's log has it") from error
