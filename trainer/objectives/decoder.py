"""The image decoder's loss (eq. 5, arXiv:2403.16627)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def down8_l1(output_BCHW: Tensor, target_BCHW: Tensor, factor: int = 8) -> Tensor:
    """|| down8(G(z)) - down8(y) ||_1 : L1 of images averaged over 8x8 blocks; ties colour and layout (eq. 5, first term)."""
    return F.l1_loss(F.avg_pool2d(output_BCHW, factor), F.avg_pool2d(target_BCHW, factor))
