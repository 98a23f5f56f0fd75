"""Small networks that tell real from generated: heads on frozen features for the finish, a classifier on the online model's for DMD2."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from trainer.models.conditioning import Conditioning
from trainer.models.features import FeatureEncoder

GROUPS = 8


class Head(nn.Module):
    """Logits of every place of a feature map, given the prompt by projection: w . h + <h, V c> / sqrt(width) (arXiv:1802.05637, scaled
    as in StyleGAN-T and ADD).

    The map's scale is not known beforehand and differs by orders of magnitude between levels; it is normalised first.
    """

    def __init__(self, channels: int, width: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, affine=False)
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(channels, width, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.logit = spectral_norm(nn.Conv2d(width, 1, 1))
        self.project = nn.Linear(text_width, width, bias=False)

    def forward(self, feature_BCHW: Tensor, text_BD: Tensor) -> Tensor:
        hidden_BCHW = self.body(self.norm(feature_BCHW))
        prompt_BCHW = self.project(text_BD)[:, :, None, None]
        told_B1HW = (hidden_BCHW * prompt_BCHW).sum(dim=1, keepdim=True) / math.sqrt(hidden_BCHW.shape[1])
        logits_B1HW: Tensor = self.logit(hidden_BCHW) + told_B1HW
        return logits_B1HW


class ProjectedDiscriminator(nn.Module):
    """A head on each map of a frozen encoder (Projected GAN, arXiv:2111.01007). Only the heads are its parameters."""

    def __init__(self, encoder: FeatureEncoder, text_width: int, width: int = 64) -> None:
        super().__init__()
        self._encoder = (encoder,)  # not a submodule: neither trained nor saved
        self.heads = nn.ModuleList([Head(channels, width, text_width) for channels in encoder.channels])

    def forward(self, latent_BCHW: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Logits of each level, (B, 1, H_l, W_l); gradients reach the latent."""
        text_BD = conditioning.text_BLD.mean(dim=1)
        text_BD = text_BD / text_BD.norm(dim=1, keepdim=True).clamp_min(1e-6)
        features = self._encoder[0](latent_BCHW, conditioning)
        return [head(feature, text_BD) for head, feature in zip(self.heads, features, strict=True)]


class MidClassifier(nn.Module):
    """One logit a sample from the deepest feature map of a U-Net (DMD2, arXiv:2405.14867)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(math.gcd(GROUPS, channels), channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(math.gcd(GROUPS, channels), channels), nn.SiLU(),
        )  # fmt: skip
        self.logit = nn.Linear(channels, 1)

    def forward(self, feature_BCHW: Tensor) -> Tensor:
        logits_B: Tensor = self.logit(self.body(feature_BCHW).mean(dim=(2, 3))).sum(dim=1)  # of one; FSDP2 wants no view
        return logits_B
