"""Adversarial losses on logits: hinge for the decoder and the finish, DMD2's classification for the online model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def generator_hinge(logits: Sequence[Tensor]) -> Tensor:
    """-E[D(x)], the mean over the discriminator's levels."""
    return torch.stack([-level.mean() for level in logits]).mean()


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """E[max(0, 1 - D(y))] + E[max(0, 1 + D(x))], the mean over the levels."""
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def classifier_loss(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """-E[log sigmoid(D(y_t))] - E[log(1 - sigmoid(D(x_t)))] on diffused real and generated samples (eq. 4, arXiv:2405.14867)."""
    return F.softplus(-real_B).mean() + F.softplus(fake_B).mean()


def generator_loss(fake_B: Tensor) -> Tensor:
    """-E[log sigmoid(D(x_t))], the generator's non-saturating side of it."""
    return F.softplus(-fake_B).mean()
