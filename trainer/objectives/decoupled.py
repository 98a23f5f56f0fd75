"""Decoupled DMD (arXiv:2511.22677): the guided score gradient split into matching and guidance, each at a re-noise draw of its own."""

from __future__ import annotations

from torch import Tensor

from trainer.objectives.diff_instruct import score_gradient


def guidance_augmentation(x0_BCHW: Tensor, cond_BCHW: Tensor, uncond_BCHW: Tensor, guidance: float) -> Tensor:
    """-(s - 1) (x_cond - x_uncond) in x0 form, per sample over mean |x - x_cond| : the part of the gradient that classifier-free
    guidance of scale s adds, which drives a few-step student, while matching keeps its distribution in check."""
    scale_B = (x0_BCHW - cond_BCHW).abs().flatten(1).mean(dim=1).clamp_min(1e-6)
    return (1 - guidance) * (cond_BCHW - uncond_BCHW) / scale_B.view(-1, 1, 1, 1)


def decoupled_gradient(
    x0_BCHW: Tensor, offline_BCHW: Tensor, online_BCHW: Tensor, augmented: tuple[Tensor, Tensor], guidance: float
) -> Tensor:
    """w (x_on - x_cond) at the first draw + guidance augmentation at the second (eq. 8, arXiv:2511.22677).

    With one draw for both and a common normalisation it is w (x_on - (x_uncond + s (x_cond - x_uncond))), Diff-Instruct's gradient
    against the guided offline model (eq. 6).

    The second draw may reach into the noisy segment that the first leaves out: no online score is needed there. The paper bounds it to
    noise below the generator's input, which for a single step from pure noise is no bound.

    Args:
        offline_BCHW, online_BCHW: x0 estimates at the first draw, the offline one without guidance.
        augmented: the offline model's conditional and unconditional x0 estimates at the second draw.
    """
    matching = score_gradient(x0_BCHW, offline_BCHW, online_BCHW)
    return matching + guidance_augmentation(x0_BCHW, *augmented, guidance)
