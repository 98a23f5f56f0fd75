"""The feature encoder f^l that a stage's section names, with what it needs from the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from sdxs.errors import InvalidRequest
from trainer.models.features import FeatureEncoder, load_encoder
from trainer.models.text import TextEncoder
from trainer.sections import FeatureSection, MatchingSection
from trainer.sources import load_frozen
from trainer.stages.context import StageContext

Features = Callable[[Tensor, list[str]], list[Tensor]]


class CaptionedFeatures:
    """An encoder asked by captions, in the worker's precision; the maps come as float32."""

    def __init__(self, encoder: FeatureEncoder, text: TextEncoder, context: StageContext) -> None:
        self.encoder, self.text, self.placement = encoder, text, context.placement

    def __call__(self, latent_BCHW: Tensor, captions: list[str]) -> list[Tensor]:
        with self.placement.autocast():
            found = self.encoder(latent_BCHW, self.text.encode(captions))
        return [feature.float() for feature in found]


def encoder_of(section: FeatureSection, context: StageContext, text: TextEncoder) -> CaptionedFeatures:
    """The encoder of a section; those of images look through the tiny decoder that the run has just trained.

    Raises:
        InvalidRequest: the encoder's source is something else, or `feature_weights` are not one for each of its maps.
    """
    decode = None if section.encoder == "unet" else tiny_decode(context.inputs["decoder"], context.placement.device)
    encoder = load_encoder(
        section.encoder, section.encoder_source, context.teacher_folder / "unet", decode, context.placement.device
    )
    if isinstance(section, MatchingSection) and len(section.feature_weights) != len(encoder.channels):
        raise InvalidRequest("feature_weights", section.feature_weights, f"{len(encoder.channels)} numbers, one for each map")
    return CaptionedFeatures(encoder, text, context)


def tiny_decode(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latents to images in [-1, 1] by the tiny decoder, which costs a twentieth of the teacher's."""
    vae: AutoencoderTiny = load_frozen(AutoencoderTiny, folder / "vae").to(device)

    def decode(latent_BCHW: Tensor) -> Tensor:
        image: Tensor = vae.decode(latent_BCHW).sample
        return image

    return decode
