"""Text, and images that steer, to images in this process: the same stages that the replicas host, called one after the other."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdxs import registry
from sdxs.bundle import Manifest
from sdxs.control import Control, check_scale, fit, map_of, read_image
from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.image_to_image import Init, check_strength
from sdxs.lora import Lora
from sdxs.lora.adapters import Use
from sdxs.lora.opened import Loras
from sdxs.noise import image_seeds, latent_noise
from sdxs.prompts import Prompts
from sdxs.residuals import Residuals
from sdxs.settings import Settings
from sdxs.sizes import Size
from sdxs.stages import ControlNets, Decoder, Encoder, TextEncoder, UNet


class OneStepPipeline:
    """`OneStepPipeline.from_bundle("emoji")("red apple", seed=7)[0].save("apple.png")`."""

    def __init__(
        self,
        manifest: Manifest,
        text_encoder: TextEncoder,
        unet: UNet,
        decoder: Decoder,
        controlnets: ControlNets | None = None,
        encoder: Callable[[], Encoder] | None = None,
    ) -> None:
        self.manifest, self.text_encoder, self.unet, self.decoder = manifest, text_encoder, unet, decoder
        self.controlnets, self._encoder = controlnets, functools.cache(encoder or _no_encoder)
        self.loras = Loras((text_encoder.adapters, unet.adapters))

    @classmethod
    def from_bundle(cls, reference: str | Path = "emoji", settings: Settings | None = None) -> OneStepPipeline:
        """Load a bundle by name, `name@pointer`, digest or folder; a Path is a folder. Raises NotFound, CorruptArtifact."""
        settings = settings or Settings()
        folder, manifest = registry.open_model(reference, settings)
        pipeline = cls(
            manifest,
            TextEncoder.from_bundle(folder, settings),
            UNet.from_bundle(folder, settings),
            Decoder.from_bundle(folder, settings),
            ControlNets.from_bundle(folder, settings) if manifest.controlnets else None,
            lambda: Encoder.from_bundle(folder, settings),
        )
        pipeline.loras.settings = settings
        return pipeline

    def __call__(  # noqa: PLR0913  (one argument per field of a request)
        self,
        prompt: str | list[str],
        seed: int = 0,
        n: int = 1,
        controls: Sequence[Control] = (),
        init_image: bytes = b"",
        strength: float = 1.0,
        loras: Sequence[Lora] = (),
        width: int = 0,
        height: int = 0,
    ) -> list[Image.Image]:
        """`n` images of each prompt. Image i of a prompt has seed + i, and is computed alone: the same bits whatever `n` is.

        Args:
            controls: images that each result follows; what several add to the U-Net is summed.
            init_image: a file to start from.
            strength: how far to go from it, from 0 (exclusive) to 1 (all the way).
            loras: on the text encoder and the U-Net, not on ControlNets; what several change is summed.
            width: of the images, as `height`; 0: the model's own. Others near it are drawn as well (sdxs.sizes), if not as well as that.

        Raises:
            InvalidRequest: something is out of range, cannot be read or does not fit the model; names the field.
            NotFound: there is no such LoRA.
            PreconditionFailed: the model has no image encoder, or a preprocessor is not installed.
        """
        if n < 1:
            raise InvalidRequest("n", n, "1 or more")
        size = self.manifest.size(width, height)
        conditions = [self._condition(control, size, f"controls[{i}]") for i, control in enumerate(controls)]
        init, uses = self._init(init_image, strength, size), self.loras.uses(loras)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return [
            Image.fromarray(self._paint(text, one, size, conditions, init, uses))
            for text in prompts
            for one in image_seeds(seed, n)
        ]

    def generate(self, prompt: str, seed: int) -> np.ndarray:
        """One image of a prompt alone, uint8 (H, W, 3)."""
        return self._paint(prompt, seed, self.manifest.size())

    def named(self, controls: Sequence[Control]) -> list[Control]:
        """The controls, each with the name of the ControlNet that it picks. Raises InvalidRequest."""
        return [replace(control, controlnet=self._name(control, f"controls[{i}]")) for i, control in enumerate(controls)]

    def _condition(self, control: Control, size: Size, field: str) -> _Condition:
        """Raises InvalidRequest that names the part of `field` at fault."""
        check_scale(control.scale, field)
        name = self._name(control, field)
        map_HWC = map_of(control, size, field)
        assert self.controlnets is not None
        return _Condition(name, map_HWC[None], self.controlnets.weights(control)[None])

    def _name(self, control: Control, field: str) -> str:
        if self.controlnets is None:
            raise InvalidRequest(field, control.type or control.controlnet, "none: this model has no ControlNet")
        return self.controlnets.pick(control, field)

    def _init(self, init_image: bytes, strength: float, size: Size) -> Init | None:
        check_strength(strength, init_image)
        if not init_image:
            return None
        image_HWC = fit(read_image(init_image, "init_image"), size.height, size.width)
        return Init(self._encoder().encode(image_HWC[None])[0], strength)

    def _paint(
        self,
        prompt: str,
        seed: int,
        size: Size,
        conditions: Sequence[_Condition] = (),
        init: Init | None = None,
        uses: Sequence[Use] = (),
    ) -> np.ndarray:
        self.text_encoder.check(prompt)
        noise_BCHW = latent_noise(seed, self.manifest.latent_of(size))[None]
        with self.text_encoder.adapters.use(uses):
            text = self.text_encoder.encode([prompt])
        added = self._residuals(noise_BCHW, text, conditions, init)
        with self.unet.adapters.use(uses):
            latent_BCHW = self.unet.denoise(noise_BCHW, text, added, [init])
        image: np.ndarray = self.decoder.decode(latent_BCHW)[0]
        return image

    def _residuals(
        self, noise_BCHW: np.ndarray, text: Prompts, conditions: Sequence[_Condition], init: Init | None
    ) -> Residuals | None:
        """The sum of what the controls add, in their order."""
        if not conditions:
            return None
        assert self.controlnets is not None
        found = [
            self.controlnets.residuals(noise_BCHW, text, one.map_BHWC, one.name, one.weights_BR, [init]) for one in conditions
        ]
        return functools.reduce(operator.add, found)


class _Condition(NamedTuple):
    """A control that has been read: whose it is, its map, and how strongly each residual counts."""

    name: str
    map_BHWC: np.ndarray
    weights_BR: np.ndarray


def _no_encoder() -> Encoder:
    raise PreconditionFailed("image to image: this pipeline has no image encoder")
