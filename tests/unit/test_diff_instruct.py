"""The SDI gradient against Gaussians, whose diffused scores are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.objectives.diff_instruct import diff_instruct, linear_schedule, score_gradient, segment_end

DATA_MEAN, DATA_STD = 1.5, 0.7


def x0_of_gaussian(x_t: Tensor, alpha: float, sigma: float, mean: float, std: float) -> Tensor:
    """E[x0 | x_t] of N(mean, std^2) data: the posterior mean of a linear Gaussian model."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x_t - alpha * mean)


def score_of_gaussian(x_t: Tensor, alpha: float, sigma: float, mean: float, std: float) -> Tensor:
    """d/dx log N(x_t; alpha mean, alpha^2 std^2 + sigma^2), written without any x0."""
    return -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def step_inputs(mean: float, std: float, alpha: float, count: int = 4096) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    x = mean + std * torch.randn(count, 1, 1, 4, generator=generator, dtype=torch.float64)
    sigma = (1 - alpha**2) ** 0.5
    return x, alpha * x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64), sigma


@pytest.mark.parametrize("alpha", [0.95, 0.6, 0.2])
def test_gradient_is_the_score_difference_up_to_the_stated_factor(alpha: float) -> None:
    x, x_t, sigma = step_inputs(mean=-0.4, std=1.3, alpha=alpha)
    offline = x0_of_gaussian(x_t, alpha, sigma, DATA_MEAN, DATA_STD)
    online = x0_of_gaussian(x_t, alpha, sigma, -0.4, 1.3)
    gradient = score_gradient(x, offline, online)
    scores = score_of_gaussian(x_t, alpha, sigma, -0.4, 1.3) - score_of_gaussian(x_t, alpha, sigma, DATA_MEAN, DATA_STD)
    weight = 1 / (x - offline).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, weight * sigma**2 / alpha * scores)


def test_autograd_passes_on_exactly_this_gradient() -> None:
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    gradient = torch.randn(3, 2, 4, 4)
    diff_instruct(x, gradient).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient / x.numel())


def test_no_gradient_where_the_distributions_are_equal() -> None:
    x, x_t, sigma = step_inputs(DATA_MEAN, DATA_STD, alpha=0.5)
    both = x0_of_gaussian(x_t, 0.5, sigma, DATA_MEAN, DATA_STD)
    assert score_gradient(x, both, both).abs().max() == 0


def test_descent_moves_a_gaussian_student_onto_the_data() -> None:
    """A student mean + std * eps, its own score known: SDI must recover the data's mean and standard deviation."""
    mean, std = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.8, requires_grad=True)
    optimizer = torch.optim.Adam([mean, std], lr=0.03)
    generator = torch.Generator().manual_seed(1)
    for _ in range(600):
        alpha = float(0.1 + 0.89 * torch.rand((), generator=generator))
        sigma = (1 - alpha**2) ** 0.5
        x = mean + std * torch.randn(256, 1, 1, 8, generator=generator)
        x_t = (alpha * x + sigma * torch.randn(x.shape, generator=generator)).detach()
        online = x0_of_gaussian(x_t, alpha, sigma, mean.item(), std.item())
        offline = x0_of_gaussian(x_t, alpha, sigma, DATA_MEAN, DATA_STD)
        loss = diff_instruct(x, score_gradient(x.detach(), offline, online))
        optimizer.zero_grad()
        (loss * 8).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(DATA_MEAN, abs=0.1)
    assert abs(std.item()) == pytest.approx(DATA_STD, abs=0.1)


def test_segment_and_schedules() -> None:
    assert segment_end(0.8, 1000) == 800
    assert [linear_schedule(1.0, 0.2, step, 5) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    with pytest.raises(ValueError, match="alpha"):
        segment_end(0.0, 1000)
