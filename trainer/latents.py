"""Encoded views of a world: the teacher trains on latents computed once, not on images encoded anew at each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trainer.models.judge import to_tensor
from trainer.worlds.base import World


@dataclass
class LatentViews:
    """latent_NCHW in float16 with the caption of each row."""

    latent_NCHW: Tensor
    captions: list[str]

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """A random batch, float32."""
        rows = torch.randint(len(self.captions), (batch,), generator=generator)
        return self.latent_NCHW[rows].float(), [self.captions[i] for i in rows.tolist()]


@torch.no_grad()
def encode_views(vae: AutoencoderKL, world: World, views: int, seed: int) -> LatentViews:
    """Encode `views` random augmented training views (posterior means)."""
    rng = np.random.default_rng([seed, views])
    parts: list[Tensor] = []
    captions: list[str] = []
    while len(captions) < views:
        images, texts = world.training_images(min(64, views - len(captions)), rng)
        parts.append(vae.encode(to_tensor(images)).latent_dist.mean.half())
        captions += texts
    return LatentViews(torch.cat(parts), captions)
