"""Segmented Diff-Instruct on two Gaussians, where scores, divergence and its gradient are known in closed form (eqs. 11-12)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.objectives.diff_instruct import denoising_loss, diff_instruct, score_gradient, segment_end

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
# The two-point Gauss-Hermite rule: the mean over +-1 of a polynomial up to degree 3 is its mean under a unit Gaussian, exactly.
# Two of them crossed: the four pixels of a sample are the nodes of (generator noise, diffusion noise).
GENERATOR_NODES = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)
DIFFUSION_NODES = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2), the same for every pixel."""

    mean: float
    std: float

    def x0(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x | x_t], by regression of two jointly Gaussian variables."""
        return self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x_t - alpha * self.mean)

    def score(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Gradient of the log density of N(alpha mean, alpha^2 std^2 + sigma^2)."""
        return -(x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)


DATA, STUDENT = Gaussian(-1.0, 1.5), Gaussian(0.8, 0.4)
DIFFUSION = Diffusion(SD)


def kl_gradient(t: int) -> tuple[float, float]:
    """d KL(student_t || data_t) / d(mean, std) of the student, with KL = ln(s_d/s_s) + (v_s + (m_s - m_d)^2) / (2 v_d) - 1/2 by hand."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    alpha_bar = math.prod(1 - (low + (high - low) * i / 999) ** 2 for i in range(t + 1))
    data_variance = alpha_bar * DATA.std**2 + 1 - alpha_bar
    student_variance = alpha_bar * STUDENT.std**2 + 1 - alpha_bar
    by_mean = alpha_bar * (STUDENT.mean - DATA.mean) / data_variance
    by_std = alpha_bar * STUDENT.std * (1 / data_variance - 1 / student_variance)
    return by_mean, by_std


def coefficients(t_B: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = DIFFUSION.coefficients(t_B)
    return alpha.double(), sigma.double()


@pytest.mark.parametrize("t", [20, 300, 700, 980])
def test_gradient_is_that_of_the_divergence_up_to_the_documented_weight(t: int) -> None:
    t_B = torch.tensor([t])
    alpha, sigma = coefficients(t_B)
    mean = torch.tensor(STUDENT.mean, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(STUDENT.std, dtype=torch.float64, requires_grad=True)
    x0 = mean + std * GENERATOR_NODES
    x_t = (alpha * x0 + sigma * DIFFUSION_NODES).detach()
    offline, online = DATA.x0(x_t, alpha, sigma), STUDENT.x0(x_t, alpha, sigma)
    diff_instruct(x0, score_gradient(x0.detach(), offline, online)).backward()
    # s_on - s_off = alpha / sigma^2 (x_on - x_off) and dx_t/dx = alpha are what w absorbs; w divides by mean|x - x_off|.
    weight = float((sigma / alpha) ** 2) / np.abs(x0.detach().numpy() - offline.numpy()).mean()
    expected_mean, expected_std = kl_gradient(t)
    assert mean.grad is not None and std.grad is not None
    assert float(mean.grad) == pytest.approx(weight * expected_mean, rel=1e-4)
    assert float(std.grad) == pytest.approx(weight * expected_std, rel=1e-4)


@pytest.mark.parametrize("t", [20, 980])
def test_difference_of_scores_is_that_of_x0_estimates(t: int) -> None:
    t_B = torch.tensor([t])
    alpha, sigma = coefficients(t_B)
    x_t = torch.linspace(-3, 3, 4, dtype=torch.float64).view(1, 1, 2, 2)
    direct = STUDENT.score(x_t, alpha, sigma) - DATA.score(x_t, alpha, sigma)
    through_x0 = alpha / sigma**2 * (STUDENT.x0(x_t, alpha, sigma) - DATA.x0(x_t, alpha, sigma))
    torch.testing.assert_close(through_x0, direct)
    torch.testing.assert_close(DIFFUSION.score(x_t, DATA.x0(x_t, alpha, sigma), t_B), DATA.score(x_t, alpha, sigma))


def test_gradient_vanishes_where_the_distributions_are_equal() -> None:
    alpha, sigma = coefficients(torch.tensor([500]))
    x_t = torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = DATA.x0(x_t, alpha, sigma)
    assert score_gradient(x_t, estimate, estimate).count_nonzero() == 0
    assert score_gradient(estimate, estimate, estimate).isfinite().all()  # the weight's denominator is zero here


def test_weight_is_per_sample_and_free_of_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, offline, online = torch.randn(3, 2, 4, 3, 3, generator=generator)
    gradient = score_gradient(x0, offline, online).numpy()
    for i in range(2):
        expected = (online[i].numpy() - offline[i].numpy()) / np.abs(x0[i].numpy() - offline[i].numpy()).mean()
        np.testing.assert_allclose(gradient[i], expected, rtol=1e-5)
    torch.testing.assert_close(score_gradient(7 * x0, 7 * offline, 7 * online), torch.from_numpy(gradient))


def test_loss_hands_back_exactly_the_given_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, wanted = torch.randn(2, 2, 4, 3, 3, generator=generator)
    x0.requires_grad_(True)
    diff_instruct(x0, wanted).backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad * x0.numel(), wanted, rtol=1e-4, atol=1e-5)


def descended(loss: Callable[[Tensor, Tensor, Tensor, Tensor, Gaussian], Tensor]) -> list[float]:
    """Mean and standard deviation of the student after descent on loss(x0, x_t, alpha, sigma, online); the online model is exact at
    every step, and x_t keeps the student's graph."""
    generator = torch.Generator().manual_seed(0)
    student = torch.tensor([STUDENT.mean, STUDENT.std], requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(300):
        noise, again = torch.randn(2, 64, 1, 4, 4, generator=generator)
        x0 = student[0] + student[1] * noise
        t_B = stratified_timesteps(64, 20, segment_end(0.98, 1000), generator)
        alpha, sigma = DIFFUSION.coefficients(t_B)
        optimizer.zero_grad()
        loss(x0, DIFFUSION.diffuse(x0, again, t_B), alpha, sigma, Gaussian(*student.tolist())).backward()
        optimizer.step()
    return student.tolist()


def test_descent_moves_the_student_onto_the_data() -> None:
    def loss(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, online: Gaussian) -> Tensor:
        offline_x0, online_x0 = (model.x0(x_t.detach(), alpha, sigma) for model in (DATA, online))
        return diff_instruct(x0, score_gradient(x0.detach(), offline_x0, online_x0))

    assert descended(loss) == pytest.approx([DATA.mean, DATA.std], abs=0.02)


@pytest.mark.parametrize(("alpha", "end"), [(1.0, 1000), (0.95, 950), (0.7004, 700), (0.0001, 1)])
def test_segment_end(alpha: float, end: int) -> None:
    assert segment_end(alpha, 1000) == end


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.001])
def test_segment_end_refuses_what_is_no_share(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        segment_end(alpha, 1000)


def test_denoising_loss_is_a_mean_square() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 2, 4, 3, 3))
    assert float(denoising_loss(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(((a - b) ** 2).mean())
