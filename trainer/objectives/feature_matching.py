"""Feature matching by structural similarity, the warm-up of one-step training (eq. 10, arXiv:2403.16627)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian_window(size: int, std: float = 1.5) -> Tensor:
    """Separable Gaussian weights of SSIM, shape (size, size), summing to one."""
    x = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    line = torch.exp(-x.square() / (2 * std**2))
    square = torch.outer(line, line)
    return square / square.sum()


def ssim(a_BCHW: Tensor, b_BCHW: Tensor, data_range_B: Tensor, window: int = 11) -> Tensor:
    """Structural similarity per element of the batch, shape (B,), averaged over channels and fully covered positions.

    Wang et al. 2004 with K1 = 0.01, K2 = 0.03 and population (not sample) covariances. The window shrinks to the largest odd size
    that fits the map.

    Args:
        data_range_B: L of the constants (K L)^2, one per batch element.
    """
    if a_BCHW.shape != b_BCHW.shape:
        raise ValueError(f"ssim needs equal shapes, got {tuple(a_BCHW.shape)} and {tuple(b_BCHW.shape)}")
    channels, smallest = a_BCHW.shape[1], min(a_BCHW.shape[-2:])
    size = min(window, smallest if smallest % 2 else smallest - 1)
    kernel = gaussian_window(size).to(a_BCHW).expand(channels, 1, size, size)
    means = F.conv2d(
        torch.cat([a_BCHW, b_BCHW, a_BCHW**2, b_BCHW**2, a_BCHW * b_BCHW]), kernel, groups=channels
    )  # one call for all five moments
    mean_a, mean_b, square_a, square_b, product = means.chunk(5)
    c1, c2 = ((k * data_range_B.view(-1, 1, 1, 1)) ** 2 for k in (0.01, 0.03))
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def feature_matching(student: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """L_FM = sum_l w_l (1 - SSIM(f^l(x_theta(eps)), f^l(psi(x_phi(eps))))) (eq. 10; the printed sign is a similarity).

    The data range of a feature map is not given; taken as six standard deviations of the target's map, per sample.
    """
    terms = []
    for s, t, weight in zip(student, target, weights, strict=True):
        data_range_B = 6 * t.detach().flatten(1).std(dim=1)
        terms.append(weight * (1 - ssim(s, t, data_range_B)).mean())
    total: Tensor = sum(terms[1:], terms[0])
    return total
