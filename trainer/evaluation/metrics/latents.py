"""Features that are always at hand: latents of the teacher's own autoencoder. They see layout and colour, not what is shown."""

from __future__ import annotations

import numpy as np
import torch

from trainer.models.judge import to_tensor
from trainer.teacher import Teacher


class LatentFeatures:
    """Flattened latents; the images must be of one size that the autoencoder takes."""

    name = "latents"

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    @torch.inference_mode()
    def features(self, image_BHWC: np.ndarray) -> np.ndarray:
        """float64, shape (N, C x H x W)."""
        encode, device = self.teacher.vae.encode, self.teacher.device
        parts = [encode(part.to(device)).latent_dist.mean.flatten(1) for part in to_tensor(image_BHWC).split(16)]
        return torch.cat(parts).double().cpu().numpy()
