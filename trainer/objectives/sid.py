"""Score identity distillation (arXiv:2404.04057; for latent text-to-image models arXiv:2505.12674)."""

from __future__ import annotations

from torch import Tensor


def sid_loss(x0_BCHW: Tensor, offline_BCHW: Tensor, online_BCHW: Tensor, alpha: float) -> Tensor:
    """w [ <x_off - x_on, x_on - x> + (1 - alpha) |x_off - x_on|^2 ], mean over elements; w = 1 / mean |x - x_off| per sample, detached.

    In x0 form: the expected squared distance of the scores, which Diff-Instruct's gradient does not minimise, equals
    E <x_off - x_on, x_off - x> when the online model is the student's exact denoiser (score identity); the loss is that estimate less alpha
    times the naive |x_off - x_on|^2, whose gradient an inexact online model biases. Gradients flow through x and through both
    models' inputs.
    """
    weight_B = 1 / (x0_BCHW - offline_BCHW).detach().abs().flatten(1).mean(dim=1).clamp_min(1e-6)
    gap = offline_BCHW - online_BCHW
    terms = gap * (online_BCHW - x0_BCHW) + (1 - alpha) * gap.square()
    return (weight_B.view(-1, 1, 1, 1) * terms).mean()
