"""The forward process in numpy, round trips of both prediction types, and the solver against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxs.noise import latent_noise
from tests.models import tiny_teacher
from trainer.diffusion import Diffusion, sample, stratified_timesteps
from trainer.teacher import InProcessTeacher, Sample, Teacher

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = st.sampled_from(["epsilon", "v_prediction"])
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA, SIGMA = np.sqrt(np.cumprod(1 - BETAS)), np.sqrt(1 - np.cumprod(1 - BETAS))


def draw(seed: int, count: int) -> list[torch.Tensor]:
    """Standard normal maps of shape (3, 2, 4, 4)."""
    return list(torch.randn(count, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed)))


def test_alpha_and_sigma_are_the_scaled_linear_schedules() -> None:
    diffusion = Diffusion(SD)
    np.testing.assert_allclose(diffusion.alpha.numpy(), ALPHA, rtol=1e-4)
    np.testing.assert_allclose(diffusion.sigma.numpy(), SIGMA, rtol=1e-4)
    assert diffusion.timesteps == 1000
    assert float(diffusion.sigma[999] / diffusion.alpha[999]) == pytest.approx(14.6146, abs=1e-3)


def test_diffuse_and_targets_in_numpy() -> None:
    (x0, noise), t_B = draw(0, 2), torch.tensor([0, 400, 999])
    alpha, sigma = (c[t_B.numpy()].reshape(3, 1, 1, 1) for c in (ALPHA, SIGMA))
    v = Diffusion({**SD, "prediction_type": "v_prediction"})
    np.testing.assert_allclose(v.diffuse(x0, noise, t_B).numpy(), alpha * x0.numpy() + sigma * noise.numpy(), atol=1e-4)
    np.testing.assert_allclose(v.target(x0, noise, t_B).numpy(), alpha * noise.numpy() - sigma * x0.numpy(), atol=1e-4)
    assert torch.equal(Diffusion(SD).target(x0, noise, t_B), noise)


@settings(max_examples=30, deadline=None)
@given(prediction=PREDICTIONS, times=st.lists(st.integers(0, 999), min_size=3, max_size=3), seed=st.integers(0, 2**32))
def test_a_perfect_output_gives_x0_back(prediction: str, times: list[int], seed: int) -> None:
    diffusion, t_B = Diffusion({**SD, "prediction_type": prediction}), torch.tensor(times)
    x0, noise = draw(seed, 2)
    x_t = diffusion.diffuse(x0, noise, t_B)
    torch.testing.assert_close(diffusion.x0(x_t, diffusion.target(x0, noise, t_B), t_B), x0, rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(t=st.integers(1, 999), seed=st.integers(0, 2**32))
def test_score_of_the_true_x0_is_minus_noise_over_sigma(t: int, seed: int) -> None:
    diffusion, t_B = Diffusion(SD), torch.tensor([t, t, t])
    x0, noise = draw(seed, 2)
    score = diffusion.score(diffusion.diffuse(x0, noise, t_B), x0, t_B)
    torch.testing.assert_close(score, (-noise / SIGMA[t]).float(), rtol=1e-3, atol=1e-3)


def test_half_precision_outputs_are_combined_in_float32() -> None:
    diffusion, t_B = Diffusion(SD), torch.tensor([999, 999, 999])
    noise, output = (part.half() for part in draw(0, 2))
    found = diffusion.x0(noise, output, t_B)
    assert found.dtype == torch.float32
    expected = (noise.double().numpy() - SIGMA[999] * output.double().numpy()) / ALPHA[999]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_other_prediction_types_are_refused() -> None:
    with pytest.raises(ValueError, match="'sample': only epsilon and v_prediction"):
        Diffusion({**SD, "prediction_type": "sample"})


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 64), low=st.integers(0, 400), strata=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_every_stratum_has_one_timestep(batch: int, low: int, strata: int, seed: int) -> None:
    t_B = stratified_timesteps(batch, low, low + batch * strata, torch.Generator().manual_seed(seed))
    assert sorted((t - low) // strata for t in t_B.tolist()) == list(range(batch))


def test_strata_come_in_random_order_and_reach_the_last_timestep() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_timesteps(10, 0, 20, generator) for _ in range(200)])
    assert set(draws[:, 0].tolist()) == set(range(20))
    narrow = stratified_timesteps(8, 5, 7, generator)
    assert sorted(narrow.tolist()) == [5] * 4 + [6] * 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(tiny_teacher(tmp_path_factory.mktemp("models") / "teacher"))


def pipeline_latents(teacher: Teacher, captions: list[str], noise: np.ndarray, guidance: float) -> np.ndarray:
    """Five DDIM steps by StableDiffusionPipeline's own loop."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(teacher.folder / "vae"), text_encoder=teacher.text.parts[0][1],
        tokenizer=teacher.text.tokenizer, unet=teacher.unet, scheduler=DDIMScheduler.from_config(teacher.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        captions, latents=torch.from_numpy(noise), num_inference_steps=5, guidance_scale=guidance, output_type="latent"
    )
    latents: np.ndarray = output.images.numpy()
    return latents


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sampling_is_diffusers_own_loop(teacher: Teacher, guidance: float) -> None:
    captions = ["a red circle", "blue star"]
    noise = np.stack([latent_noise(seed, (8, 4, 4)) for seed in (5, 6)])
    expected = pipeline_latents(teacher, captions, noise, guidance)
    with torch.no_grad():
        predict = teacher.guided(captions, guidance)
        found = sample(predict, torch.from_numpy(noise), teacher.scheduler_config, steps=5).numpy()
    assert np.abs(expected - noise).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    [reply] = InProcessTeacher(teacher).submit(Sample(noise, captions, 5, guidance)).result()
    np.testing.assert_allclose(reply.astype(np.float32), expected, rtol=2e-3, atol=2e-3)  # float16 on the wire


def test_solvers_converge_to_the_exact_flow_of_a_gaussian() -> None:
    """For N(m, s^2) the flow maps x_T to m + s (x_T - alpha_T m) / sqrt(alpha_T^2 s^2 + sigma_T^2)."""
    config, mean, std = {**SD, "clip_sample": False}, 0.5, 2.0
    diffusion = Diffusion(config)

    def predict(x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        alpha, sigma = diffusion.coefficients(t_B)
        return sigma * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    [noise] = draw(0, 1)
    exact = mean + std * (noise.numpy() - ALPHA[999] * mean) / np.sqrt(ALPHA[999] ** 2 * std**2 + SIGMA[999] ** 2)

    def error(solver: str, steps: int) -> float:
        return float(np.abs(sample(predict, noise, config, steps, solver).numpy() - exact).max())

    assert error("ddim", 40) == pytest.approx(error("ddim", 10) / 4, rel=0.15)  # first order
    assert error("dpm", 20) < error("dpm", 10) / 2.5  # second order, nearly
    assert error("dpm", 10) < error("ddim", 40)


@pytest.mark.parametrize("solver", ["ddim", "dpm", "euler"])
def test_latents_are_not_clipped_where_the_scheduler_says_nothing_of_it(solver: str) -> None:
    """A model that answers x0 = 30 everywhere."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "sample"}
    found = sample(lambda x, _t: torch.full_like(x, 30.0), torch.randn(1, 4, 4, 4), config, 3, solver)
    assert float(found.mean()) == pytest.approx(30.0, rel=0.05)
