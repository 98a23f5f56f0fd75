"""Latent consistency distillation (arXiv:2310.04378, after Consistency Models, arXiv:2303.01469)."""

from __future__ import annotations

from torch import Tensor

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


def boundary_scalings(t_B: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip = s^2 / ((10 t)^2 + s^2), c_out = 10 t / sqrt((10 t)^2 + s^2), s = 0.5; shape (B, 1, 1, 1).

    f(x, t) = c_skip x + c_out x0_hat is x at t = 0, and nearly x0_hat elsewhere.
    """
    scaled = TIMESTEP_SCALING * t_B.double().view(-1, 1, 1, 1)
    total = scaled.square() + SIGMA_DATA**2
    return (SIGMA_DATA**2 / total).float(), (scaled / total.sqrt()).float()


def ddim_step(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_s = alpha_s x0_hat + sigma_s eps_hat : the probability-flow ODE's step to another time (arXiv:2010.02502, eq. 12 without noise)."""
    return alpha * x0_BCHW + sigma * noise_BCHW


def pseudo_huber(a_BCHW: Tensor, b_BCHW: Tensor, c: float) -> Tensor:
    """E[ sqrt((a - b)^2 + c^2) - c ], the distance of the consistency loss (arXiv:2310.14189, in LCM's released training per element)."""
    return ((a_BCHW - b_BCHW).square() + c * c).sqrt().sub(c).mean()
