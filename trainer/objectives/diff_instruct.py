"""Segmented Diff-Instruct (eqs. 11-12, arXiv:2403.16627)."""

from __future__ import annotations

import torch
from torch import Tensor


def score_gradient(x0_BCHW: Tensor, offline_x0_BCHW: Tensor, online_x0_BCHW: Tensor) -> Tensor:
    """Gradient with respect to the student's output x: w (s_online - s_offline) in x0 form, w (x_on - x_off), per sample.

    Both scores are (alpha_t x0_hat - x_t) / sigma_t^2, so their difference is alpha_t / sigma_t^2 (x_on - x_off); that factor and
    dx_t/dx = alpha_t are absorbed in w(t), chosen as 1 / mean|x - x_off| per sample (DMD's normalisation, arXiv:2311.18828), which
    makes every t contribute alike.
    """
    scale_B = (x0_BCHW - offline_x0_BCHW).abs().flatten(1).mean(dim=1).clamp_min(1e-6)
    return (online_x0_BCHW - offline_x0_BCHW) / scale_B.view(-1, 1, 1, 1)


def diff_instruct(x0_BCHW: Tensor, gradient_BCHW: Tensor) -> Tensor:
    """A loss whose gradient with respect to x0 is `gradient` / (number of elements per sample * batch): 0.5 || x - sg(x - g) ||^2, mean."""
    target = (x0_BCHW - gradient_BCHW).detach()
    return 0.5 * (x0_BCHW - target).square().mean()


def segment_end(alpha: float, timesteps: int) -> int:
    """alpha T: the score term integrates t in [0, alpha T); above it feature matching takes its place (eq. 12).

    Raises:
        ValueError: alpha is not in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha {alpha}: must be in (0, 1]")
    return max(1, round(alpha * timesteps))


def denoising_loss(output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """The online model's loss on diffused student samples (Alg. 1, line 5)."""
    return torch.nn.functional.mse_loss(output_BCHW, target_BCHW)
