"""What the rooms that take a DenoiseRequest share: reading it, preparing its control images, running its ControlNets.

The U-Net's room and the ControlNet's read the same message; either may host the ControlNets (placement `fused` or not).
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxs import bundle, control, sizes, tensors
from sdxs.errors import InvalidRequest
from sdxs.image_to_image import Init
from sdxs.noise import MAX_IMAGES, latent_noise
from sdxs.prompts import Prompts
from sdxs.residuals import Residuals
from sdxs.sizes import Size
from sdxs.v1 import control_pb2, text_encoder_pb2, unet_pb2

if TYPE_CHECKING:
    from sdxs.lora.adapters import Use
    from sdxs.stages import ControlNets

Array = np.ndarray


@dataclass(frozen=True)
class Facts:
    """Of the bundle, what its requests must fit."""

    digest: str
    image_size: int
    """Pixels of a side of the model's own images."""
    latent_shape: tuple[int, int, int]
    """Of those."""
    text_shape: tuple[int, int]
    pooled_width: int

    @classmethod
    def of(cls, folder: Path, digest: str) -> "Facts":
        """Of the bundle in `folder`."""
        manifest = bundle.facts(folder)
        text_shape = (manifest.max_prompt_tokens, manifest.text_width)
        return cls(digest, manifest.image_size, manifest.latent_shape, text_shape, manifest.pooled_width)

    @property
    def upsampling(self) -> int:
        """Pixels of an image to one of its latent, along a side."""
        return self.image_size // self.latent_shape[1]

    def latent_of(self, size: Size) -> tuple[int, int, int]:
        """(C, H, W) of the latent of an image."""
        return self.latent_shape[0], size.height // self.upsampling, size.width // self.upsampling


@dataclass(frozen=True)
class Condition:
    """One control of one image: a ControlNet's name, its map, uint8 [height, width, 3], and the weight of each residual."""

    name: str
    map_HWC: Array
    weights_R: Array


@dataclass(frozen=True)
class Image:
    """What one image is computed from."""

    seed: int
    prompt: Prompts
    size: Size
    init: Init | None = None
    """Image to image: what it starts from."""
    conditions: tuple[Condition, ...] = ()
    residuals: Residuals | None = None
    """What its conditions add, computed elsewhere."""
    loras: "tuple[Use, ...]" = ()
    """Attached."""


@dataclass(frozen=True)
class Guided:
    """What one image's conditions add, and the largest batch that was computed for it."""

    residuals: Residuals | None
    batch: int


def read(request: unet_pb2.DenoiseRequest, facts: Facts) -> list[Image]:
    """The images a request asks for, without its controls and residuals. Raises InvalidRequest that names the field at fault."""
    if not 1 <= len(request.seeds) <= MAX_IMAGES:
        raise InvalidRequest("seeds", len(request.seeds), f"1 to {MAX_IMAGES} seeds")
    if request.text.model_digest != facts.digest:
        raise InvalidRequest("text.model_digest", request.text.model_digest, facts.digest)
    size = size_of(request, facts)
    prompt, init = _prompt(request.text, facts), _init(request, facts.latent_of(size))
    return [Image(seed, prompt, size, init) for seed in request.seeds]


def size_of(request: unet_pb2.DenoiseRequest, facts: Facts) -> Size:
    """Of its images. Raises InvalidRequest."""
    return sizes.chosen(request.width, request.height, facts.image_size, facts.upsampling)


def warming(facts: Facts) -> unet_pb2.DenoiseRequest:
    """A request of one image that means nothing."""
    text = tensors.encode(np.zeros(facts.text_shape, np.float32))
    pooled = tensors.encode(np.zeros(facts.pooled_width, np.float32)) if facts.pooled_width else None
    encoded = text_encoder_pb2.EncodeResponse(text=text, pooled=pooled, model_digest=facts.digest)
    return unet_pb2.DenoiseRequest(text=encoded, seeds=[0])


def _prompt(encoded: text_encoder_pb2.EncodeResponse, facts: Facts) -> Prompts:
    """The message's one prompt. Raises InvalidRequest that names the tensor at fault."""
    text_LD = tensors.decode(encoded.text, "text.text", facts.text_shape)
    if not facts.pooled_width:
        return Prompts(text_LD[None])
    if not encoded.HasField("pooled"):
        raise InvalidRequest("text.pooled", None, f"[{facts.pooled_width}]: this model's U-Net takes a pooled embedding too")
    return Prompts(text_LD[None], tensors.decode(encoded.pooled, "text.pooled", (facts.pooled_width,))[None])


def _init(request: unet_pb2.DenoiseRequest, latent_shape: tuple[int, int, int]) -> Init | None:
    """Raises InvalidRequest."""
    if not request.HasField("init_latent"):
        return None
    if not 0 < request.strength <= 1:
        raise InvalidRequest("strength", request.strength, "above 0, at most 1")
    latent_CHW = tensors.decode(request.init_latent, "init_latent", latent_shape)
    if not np.isfinite(latent_CHW).all():
        raise InvalidRequest("init_latent.data", "not a number or infinite", "finite numbers")
    return Init(latent_CHW, request.strength)


async def prepare(
    controls: Sequence[control_pb2.Control], controlnets: "ControlNets | None", size: Size
) -> tuple[Condition, ...]:
    """The controls' maps for images of that size, made in threads. Raises InvalidRequest and NotFound that name the control's field."""
    if not controls:
        return ()
    if controlnets is None:
        raise InvalidRequest("controls", len(controls), "none: this replica hosts no ControlNets")
    making = [asyncio.to_thread(_condition, message, controlnets, size, f"controls[{i}]") for i, message in enumerate(controls)]
    return tuple(await asyncio.gather(*making))


def _condition(message: control_pb2.Control, controlnets: "ControlNets", size: Size, field: str) -> Condition:
    """One control's ControlNet, map and weights."""
    asked = control_of(message)
    name = controlnets.pick(asked, field)
    return Condition(name, control.map_of(asked, size, field), controlnets.weights(asked))


def control_of(message: control_pb2.Control) -> control.Control:
    """The message as the library knows it."""
    scale = message.scale if message.HasField("scale") else 1.0
    return control.Control(message.image, message.type, message.controlnet, scale, message.guess, message.preprocessed)


def noise(images: Sequence[Image], facts: Facts) -> Array:
    """Where each image starts, [images, channels, height, width]; all of one size."""
    return np.stack([latent_noise(image.seed, facts.latent_of(image.size)) for image in images])


def guide(images: Sequence[Image], noise_BCHW: Array, controlnets: "ControlNets", keep: bool = False) -> list[Guided]:
    """Run the ControlNets of a batch of images, those of the same ControlNet together; `keep`: on its device.

    The first use of a ControlNet by each image is one forward pass, the second use the next: an image alone has each of its controls
    computed alone, as the in-process pipeline does. Sums are in the order of an image's controls.
    """
    together: defaultdict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for index, image in enumerate(images):
        names = [condition.name for condition in image.conditions]
        for place, name in enumerate(names):
            together[name, names[:place].count(name)].append((index, place))
    run = controlnets.device_residuals if keep else controlnets.residuals
    found: dict[tuple[int, int], Guided] = {}
    for (name, _), uses in together.items():
        conditions = [images[index].conditions[place] for index, place in uses]
        residuals = run(
            noise_BCHW[[index for index, _ in uses]],
            Prompts.stack([images[index].prompt for index, _ in uses]),
            np.stack([condition.map_HWC for condition in conditions]),
            name,
            np.stack([condition.weights_R for condition in conditions]),
            [images[index].init for index, _ in uses],
        )
        found |= {use: Guided(row, len(uses)) for use, row in zip(uses, residuals.rows(), strict=True)}
    return [_sum([found[index, place] for place in range(len(image.conditions))]) for index, image in enumerate(images)]


def _sum(parts: Sequence[Guided]) -> Guided:
    """Several ControlNets on one image."""
    total: Residuals | None = None
    for part in parts:
        total = part.residuals if total is None or part.residuals is None else total + part.residuals
    return Guided(total, max((part.batch for part in parts), default=0))


def blank(name: str, controlnets: "ControlNets", facts: Facts) -> Condition:
    """A condition that shows nothing, to warm that ControlNet with."""
    map_HWC = np.zeros((facts.image_size, facts.image_size, 3), np.uint8)
    return Condition(name, map_HWC, controlnets.weights(control.Control(b"", controlnet=name)))
