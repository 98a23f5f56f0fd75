"""Output and feature distillation of the shrunk U-Net (eqs. 6-8, arXiv:2403.16627)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def output_distillation(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """L_OKD = E|| s_theta - s_phi ||^2 (eq. 6), on network outputs.

    BK-SDM's weighting, which keeps small t from dominating. With s = -eps/sigma_t, a difference of outputs is one of scores times
    sigma_t where the network predicts eps, times sigma_t/alpha_t where it predicts v = alpha_t eps - sigma_t x0.
    """
    return F.mse_loss(student_BCHW, teacher_BCHW)


def feature_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """L_FKD = E sum_l || f_theta^l - f_phi^l ||^2 (eq. 7), each layer relative to its teacher's mean square.

    Relative, because layers differ in scale by orders of magnitude; lambda_F is then the same for any teacher.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student features but {len(teacher)} teacher features")
    terms = [F.mse_loss(s, t) / t.square().mean().clamp_min(1e-8) for s, t in zip(student, teacher, strict=True)]
    total: Tensor = sum(terms[1:], terms[0])
    return total


def knowledge_distillation(output_loss: Tensor, feature_loss: Tensor, feature_weight: float) -> Tensor:
    """L_KD = L_OKD + lambda_F L_FKD (eq. 8)."""
    return output_loss + feature_weight * feature_loss
