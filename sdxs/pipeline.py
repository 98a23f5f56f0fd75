"""Text to images in this process: the same three stages that the replicas host, called one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sdxs import registry
from sdxs.bundle import Manifest
from sdxs.errors import InvalidRequest
from sdxs.noise import image_seeds, latent_noise
from sdxs.settings import Settings
from sdxs.stages import Decoder, TextEncoder, UNet


class OneStepPipeline:
    """`OneStepPipeline.from_bundle("emoji")("red apple", seed=7)[0].save("apple.png")`."""

    def __init__(self, manifest: Manifest, text_encoder: TextEncoder, unet: UNet, decoder: Decoder) -> None:
        self.manifest, self.text_encoder, self.unet, self.decoder = manifest, text_encoder, unet, decoder

    @classmethod
    def from_bundle(cls, reference: str | Path = "emoji", settings: Settings | None = None) -> OneStepPipeline:
        """Load a bundle by name, `name@pointer`, digest or folder; a Path is a folder. Raises NotFound, CorruptArtifact."""
        settings = settings or Settings()
        folder, manifest = registry.open_model(reference, settings)
        return cls(
            manifest,
            TextEncoder.from_bundle(folder, settings),
            UNet.from_bundle(folder, settings),
            Decoder.from_bundle(folder, settings),
        )

    def __call__(self, prompt: str | list[str], seed: int = 0, n: int = 1) -> list[Image.Image]:
        """`n` images of each prompt. Image i of a prompt has seed + i, and is computed alone: the same bits whatever `n` is.

        Raises:
            InvalidRequest: prompt, seed or n is out of range; names the field.
        """
        if n < 1:
            raise InvalidRequest("n", n, "1 or more")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return [Image.fromarray(self.generate(text, one)) for text in prompts for one in image_seeds(seed, n)]

    def generate(self, prompt: str, seed: int) -> np.ndarray:
        """One image, uint8 (H, W, 3)."""
        self.text_encoder.check(prompt)
        noise_BCHW = latent_noise(seed, self.unet.latent_shape)[None]
        latent_BCHW = self.unet.denoise(noise_BCHW, self.text_encoder.encode([prompt]))
        image: np.ndarray = self.decoder.decode(latent_BCHW)[0]
        return image
