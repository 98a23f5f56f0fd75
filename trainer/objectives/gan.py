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


def approximate_r1(clean: Sequence[Tensor], moved: Sequence[Tensor], sigma: float) -> Tensor:
    """E[ (D(y + sigma n) - D(y))^2 ] / sigma^2, n unit noise, the mean over the levels: |grad D(y)|^2 on real samples (R1,
    arXiv:1801.04406) by a finite difference (arXiv:2501.08316), D being a sample's mean logit of a level.

    One more forward call in place of a gradient of a gradient, which DistributedDataParallel does not support.
    """
    terms = [(m - c).flatten(1).mean(dim=1).square().mean() / sigma**2 for c, m in zip(clean, moved, strict=True)]
    return torch.stack(terms).mean()


def classifier_loss(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """-E[log sigmoid(D(y_t))] - E[log(1 - sigmoid(D(x_t)))] on diffused real and generated samples (eq. 4, arXiv:2405.14867)."""
    return F.softplus(-real_B).mean() + F.softplus(fake_B).mean()


def generator_loss(fake_B: Tensor) -> Tensor:
    """-E[log sigmoid(D(x_t))], the generator's non-saturating side of it."""
    return F.softplus(-fake_B).mean()
