"""Schedules, Decoupled DMD, SiD, adversarial and consistency losses: against closed forms of Gaussians, numpy and diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.test_diff_instruct import (
    DATA,
    DIFFUSION,
    DIFFUSION_NODES,
    GENERATOR_NODES,
    SD,
    STUDENT,
    Gaussian,
    coefficients,
    descended,
)
from trainer.diffusion import stratified_timesteps
from trainer.objectives.decoupled import decoupled_gradient, guidance_augmentation
from trainer.objectives.diff_instruct import score_gradient
from trainer.objectives.gan import classifier_loss, discriminator_hinge, generator_hinge, generator_loss
from trainer.objectives.lcm import boundary_scalings, ddim_step, pseudo_huber
from trainer.objectives.schedules import AdaptiveProgress, interpolate, overlap_gap, progress
from trainer.objectives.sid import sid_loss


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_linear_and_cosine_reach_both_ends_and_stay() -> None:
    assert [progress("linear", step, 5) for step in range(7)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1])
    expected = [0.5 - 0.5 * math.cos(math.pi * step / 4) for step in range(5)]
    assert [progress("cosine", step, 5) for step in range(5)] == pytest.approx(expected)
    assert progress("linear", 0, 1) == 0
    assert interpolate(1.0, 0.2, 0.5) == pytest.approx(0.6)


@given(gaps=st.lists(st.floats(0, 3), min_size=1, max_size=30))
def test_adaptive_progress_is_a_share_that_never_goes_back(gaps: list[float]) -> None:
    adaptive, values = AdaptiveProgress(1.0, 0.2), []
    for gap in gaps:
        adaptive.note(gap)
        values.append(adaptive.value)
    assert values == sorted(values)
    assert all(0 <= value <= 1 for value in values)
    again = AdaptiveProgress(1.0, 0.2)
    again.load_state_dict(adaptive.state_dict())
    again.note(0.1)
    adaptive.note(0.1)
    assert again.value == adaptive.value


def test_adaptive_progress_by_hand_and_its_bounds() -> None:
    adaptive = AdaptiveProgress(0.9, 0.5, decay=0.5)
    found = []
    for gap in (0.0, 2.0, 1.0, 0.4, 0.1, 3.0):  # averages 0, 1, 1, 0.7, 0.4, 1.7
        adaptive.note(gap)
        found.append(adaptive.value)
    assert found == pytest.approx([0, 0, 0, 0.5, 1, 1])
    for bounds in ((0.5, 1.0), (1.1, 0.5), (0.5, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="overlap"):
            AdaptiveProgress(*bounds)


def followed(learning: float, steps: int = 500) -> tuple[list[float], list[float]]:
    """The share p and the student's distance to the data's mean, while an online model that starts as the offline one learns the
    student's distribution at a rate and the student moves as far as the two models differ."""
    generator = torch.Generator().manual_seed(0)
    student, online, data = (torch.tensor([one.mean, one.std]) for one in (STUDENT, DATA, DATA))
    adaptive, values, distances = AdaptiveProgress(1.0, 0.5), [], []
    for _ in range(steps):
        noise, again = torch.randn(2, 16, 1, 4, 4, generator=generator)
        t_B = stratified_timesteps(16, 20, 980, generator)
        alpha, sigma = DIFFUSION.coefficients(t_B)
        x0 = student[0] + student[1] * noise
        x_t = alpha * x0 + sigma * again
        gap = float(overlap_gap(x0, DATA.x0(x_t, alpha, sigma), Gaussian(*online.tolist()).x0(x_t, alpha, sigma)))
        adaptive.note(gap)
        online = torch.lerp(online, student, learning)
        student = torch.lerp(student, data, 0.01 * gap)
        values.append(adaptive.value)
        distances.append(abs(float(student[0]) - DATA.mean))
    return values, distances


@pytest.mark.parametrize("learning", [0.01, 0.1])
def test_adaptive_progress_waits_for_the_online_model_and_ends_near_overlap(learning: float) -> None:
    values, distances = followed(learning)
    start = next(step for step, value in enumerate(values) if value > 0.05)
    end = next(step for step, value in enumerate(values) if value == 1)
    assert values[20] < 0.05  # the gap begins at 0, which is no overlap
    assert distances[end] < 0.6 * distances[start] < 0.6 * distances[0]


def test_the_gap_closes_as_the_students_distribution_nears_the_datas() -> None:
    """Student means on the way to the data's: the gap falls to zero with the distance."""
    alpha, sigma = coefficients(torch.tensor([500]))
    gaps = []
    for share in (0.0, 0.5, 0.9, 1.0):
        student = Gaussian(interpolate(STUDENT.mean, DATA.mean, share), interpolate(STUDENT.std, DATA.std, share))
        x0 = student.mean + student.std * draws(4096, 1, 1, 1)
        x_t = alpha * x0 + sigma * draws(4096, 1, 1, 1, seed=1)
        gaps.append(float(overlap_gap(x0, DATA.x0(x_t, alpha, sigma), student.x0(x_t, alpha, sigma))))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.8
    assert gaps[-1] == 0


def test_equal_draws_give_the_gradient_against_the_guided_model() -> None:
    x0, cond, uncond, online = draws(4, 2, 3, 4, 4).unbind(0)
    found = decoupled_gradient(x0, cond, online, (cond, uncond), guidance=3.5)
    guided = uncond + 3.5 * (cond - uncond)
    scale = (x0 - cond).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, (online - guided) / scale)
    assert guidance_augmentation(x0, cond, uncond, 1.0).count_nonzero() == 0
    torch.testing.assert_close(decoupled_gradient(x0, cond, online, (cond, uncond), 1.0), score_gradient(x0, cond, online))


def test_the_score_identity_holds_for_an_exact_online_model() -> None:
    """E <x_off - x_on, x_off - x> = E |x_off - x_on|^2, by quadrature that is exact for Gaussians."""
    alpha, sigma = coefficients(torch.tensor([400]))
    x0 = STUDENT.mean + STUDENT.std * GENERATOR_NODES
    x_t = alpha * x0 + sigma * DIFFUSION_NODES
    gap = DATA.x0(x_t, alpha, sigma) - STUDENT.x0(x_t, alpha, sigma)
    assert float((gap * (DATA.x0(x_t, alpha, sigma) - x0)).mean()) == pytest.approx(float(gap.square().mean()))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_sid_is_the_identity_less_alpha_times_the_square(alpha: float) -> None:
    x0, offline, online = draws(3, 2, 3, 4, 4).unbind(0)
    found = sid_loss(x0, offline, online, alpha)
    a, b, c = (part.numpy() for part in (x0, offline, online))
    weight = 1 / np.abs(a - b).mean(axis=(1, 2, 3), keepdims=True)
    assert float(found) == pytest.approx((weight * ((b - c) * (b - a) - alpha * (b - c) ** 2)).mean())


def test_descent_on_sid_moves_the_student_onto_the_data() -> None:
    """Both models see the student's own x_t, and pass its gradient on."""

    def loss(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, online: Gaussian) -> Tensor:
        return sid_loss(x0, DATA.x0(x_t, alpha, sigma), online.x0(x_t, alpha, sigma), 1.0)

    assert descended(loss) == pytest.approx([DATA.mean, DATA.std], abs=0.1)


def sid_expectation(mean: float, std: float, online: Gaussian, t: int, alpha: float) -> float:
    """E[ d (x_on - x) + (1 - alpha) d^2 ], d = x_off - x_on, of a Gaussian student from the moments of (x, x_t) alone: both estimates
    are lines in x_t."""
    a, s = (float(part) for part in coefficients(torch.tensor([t])))
    slope = {one: a * one.std**2 / (a**2 * one.std**2 + s**2) for one in (DATA, online)}
    offset = {one: one.mean * (1 - slope[one] * a) for one in (DATA, online)}
    b, c = slope[DATA] - slope[online], offset[DATA] - offset[online]
    first, second, mixed = a * mean, a**2 * (mean**2 + std**2) + s**2, a * (mean**2 + std**2)
    on = b * slope[online] * second + (b * offset[online] + c * slope[online]) * first + c * offset[online]
    sample = b * mixed + c * mean
    return on - sample + (1 - alpha) * (b * b * second + 2 * b * c * first + c * c)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize(("t", "student"), [(300, STUDENT), (800, STUDENT), (300, DATA)])
def test_the_gradient_of_sid_is_that_of_its_expectation(t: int, student: Gaussian, alpha: float) -> None:
    """Through x and through both models' x_t, the online model's own numbers held still; against finite differences."""
    a, s = coefficients(torch.tensor([t]))
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (student.mean, student.std))
    x0 = mean + std * GENERATOR_NODES
    x_t = a * x0 + s * DIFFUSION_NODES
    offline, online = DATA.x0(x_t, a, s), student.x0(x_t, a, s)
    sid_loss(x0, offline, online, alpha).backward()
    weight = 1 / np.abs((x0 - offline).detach().numpy()).mean()
    assert mean.grad is not None and std.grad is not None
    for gradient, (up, down) in ((mean.grad, ((1e-5, 0), (-1e-5, 0))), (std.grad, ((0, 1e-5), (0, -1e-5)))):
        above, below = (sid_expectation(student.mean + dm, student.std + ds, student, t, alpha) for dm, ds in (up, down))
        assert float(gradient) == pytest.approx(weight * (above - below) / 2e-5, rel=1e-3, abs=1e-6)
    if student is DATA:
        assert float(mean.grad) == float(std.grad) == 0  # the distributions are one
    else:
        towards = float(mean.grad) * (DATA.mean - STUDENT.mean) + float(std.grad) * (DATA.std - STUDENT.std)
        assert towards < 0


def test_adversarial_losses_by_hand() -> None:
    real, fake = [np.array([0.5, 2.0]), np.array([[-1.0]])], [np.array([-0.5, 0.0]), np.array([[3.0]])]
    tensors = [[torch.from_numpy(level) for level in side] for side in (real, fake)]
    hinge = [np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean() for r, f in zip(real, fake, strict=True)]
    assert float(discriminator_hinge(*tensors)) == pytest.approx(np.mean(hinge))
    assert float(generator_hinge(tensors[1])) == pytest.approx(-(-0.25 + 3.0) / 2)
    sigmoid = {value: 1 / (1 + math.exp(-value)) for value in (0.5, 2.0, -0.5, 0.0)}
    expected = (
        -(math.log(sigmoid[0.5]) + math.log(sigmoid[2.0])) / 2 - (math.log(1 - sigmoid[-0.5]) + math.log(1 - sigmoid[0.0])) / 2
    )
    assert float(classifier_loss(tensors[0][0], tensors[1][0])) == pytest.approx(expected)
    assert float(generator_loss(tensors[1][0])) == pytest.approx(-(math.log(sigmoid[-0.5]) + math.log(sigmoid[0.0])) / 2)


def test_the_consistency_function_is_the_identity_at_zero() -> None:
    skip, out = boundary_scalings(torch.tensor([0, 1, 999]))
    assert (float(skip[0]), float(out[0])) == (1.0, 0.0)
    assert float(skip[1]) == pytest.approx(0.25 / 100.25)
    assert float(out[1]) == pytest.approx(10 / math.sqrt(100.25))
    assert float(skip[2]) < 1e-8 < 1 - 1e-6 < float(out[2])


def test_a_step_is_that_of_ddim() -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    x, eps = draws(2, 1, 3, 4, 4).unbind(0)
    t, before = int(scheduler.timesteps[10]), int(scheduler.timesteps[11])
    (alpha, sigma), (next_alpha, next_sigma) = (coefficients(torch.tensor([time])) for time in (t, before))
    expected = scheduler.step(eps, t, x).prev_sample
    found = ddim_step((x - sigma * eps) / alpha, eps, next_alpha, next_sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pseudo_huber_is_quadratic_near_and_linear_far() -> None:
    a = torch.tensor([[[[0.0, 3.0, 1e-4]]]], dtype=torch.float64)
    expected = np.mean([0, math.sqrt(9 + 1e-6) - 1e-3, math.sqrt(1e-8 + 1e-6) - 1e-3])
    assert float(pseudo_huber(a, torch.zeros_like(a), 1e-3)) == pytest.approx(expected)
