"""Few-step models that draw the samples, an LCM and SD-Turbo's kind, against diffusers' own pipelines and arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)  # fmt: skip

from sdxs.noise import latent_noise
from tests.models import tiny_teacher
from trainer.diffusion import Diffusion, row_generators, sample
from trainer.models.conditioning import guidance_embedding
from trainer.pool.joining import join, split
from trainer.sections import PairsSection
from trainer.teacher import Denoise, Sample, Teacher

SHAPE, CAPTIONS, WIDTH = (8, 4, 4), ["a red circle", "blue star", "green square"], 12
NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise_of(*seeds: int) -> np.ndarray:
    return np.stack([latent_noise(seed, SHAPE) for seed in seeds])


def told_of_guidance(folder: Path) -> Path:
    """Make a teacher's U-Net one that takes an embedding of the guidance, as an LCM's does."""
    config = UNet2DConditionModel.load_config(folder / "unet") | {"time_cond_proj_dim": WIDTH}
    torch.manual_seed(2)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    LCMScheduler(**NOISE, original_inference_steps=50).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(told_of_guidance(tiny_teacher(tmp_path_factory.mktemp("lcm") / "teacher")))


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny_teacher(tmp_path_factory.mktemp("turbo") / "teacher")
    EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    return Teacher(folder)


def pipeline_of(kind: Any, teacher: Teacher, scheduler: Any) -> Any:
    """A pipeline of diffusers around the teacher's own networks."""
    tokenizer, text_encoder = teacher.text.parts[0]
    more = {} if kind is LatentConsistencyModelPipeline else {"image_encoder": None}
    made = kind(
        vae=AutoencoderKL.from_pretrained(teacher.folder / "vae"), text_encoder=text_encoder, tokenizer=tokenizer, unet=teacher.unet,
        scheduler=scheduler.from_pretrained(teacher.folder / "scheduler"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **more,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("steps", "guidance"), [(1, 8.0), (4, 8.0), (4, 1.5)])
def test_an_lcm_draws_as_its_own_pipeline_does(lcm: Teacher, steps: int, guidance: float) -> None:
    noise = noise_of(5, 6, 7)
    pipeline = pipeline_of(LatentConsistencyModelPipeline, lcm, LCMScheduler)
    expected = pipeline(
        CAPTIONS, latents=torch.from_numpy(noise), num_inference_steps=steps, guidance_scale=guidance,
        generator=row_generators(torch.from_numpy(noise)), output_type="latent",
    ).images.numpy()  # fmt: skip
    [found] = lcm.answer(Sample(noise, CAPTIONS, steps, guidance, "lcm"))
    assert np.abs(expected - noise).max() > 0.1
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2e-3, atol=2e-3)  # float16 on the wire


def test_an_lcm_is_told_of_the_guidance_and_computes_once(lcm: Teacher) -> None:
    """The embedding by its formula in numpy; no unconditional rows."""
    frequencies = np.exp(-np.log(1e4) * np.arange(WIDTH // 2) / (WIDTH // 2 - 1))
    by_hand = np.concatenate([np.sin(1000 * 3.5 * frequencies), np.cos(1000 * 3.5 * frequencies)])
    np.testing.assert_allclose(guidance_embedding(3.5, WIDTH)[0].numpy(), by_hand, atol=1e-3)
    assert guidance_embedding(3.5, WIDTH + 1).shape == (1, WIDTH + 1)

    noise, t_B = noise_of(1, 2), np.array([499, 999])
    text = lcm.text.encode(CAPTIONS[:2])
    with torch.no_grad():
        told = torch.from_numpy(by_hand).float().expand(2, -1)
        inputs = torch.from_numpy(noise), torch.from_numpy(t_B)
        expected = lcm.unet(*inputs, **text.arguments(), timestep_cond=told).sample.numpy()
        untold = lcm.unet(*inputs, **text.arguments()).sample.numpy()
    found, feature = lcm.answer(Denoise(noise, t_B, CAPTIONS[:2], 4.5, ("up_blocks.0",)))
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    assert np.abs(expected - untold).max() > 0.02
    assert len(feature) == 2


def test_fresh_noise_of_a_row_does_not_depend_on_its_batch(lcm: Teacher) -> None:
    """Asked for alone, together, or joined with another worker's rows."""
    asked = [Sample(noise_of(*seeds), CAPTIONS[: len(seeds)], 4, 8.0, "lcm") for seeds in ((1, 2, 3), (9,))]
    apart = [lcm.answer(request)[0] for request in asked]
    joined = split(lcm.answer(join(asked)), [3, 1])
    for one, [other] in zip(apart, joined, strict=True):
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2e-3, atol=2e-3)
    alone = lcm.answer(Sample(noise_of(3), CAPTIONS[2:3], 4, 8.0, "lcm"))[0]
    np.testing.assert_allclose(alone[0].astype(np.float32), apart[0][2].astype(np.float32), rtol=2e-3, atol=2e-3)
    draws = [torch.randn(64, generator=generator) for generator in row_generators(torch.from_numpy(noise_of(1, 2, 1)))]
    assert torch.equal(draws[0], draws[2]) and abs(float(torch.corrcoef(torch.stack(draws[:2]))[0, 1])) < 0.5


def test_more_steps_than_an_lcm_knows_are_refused() -> None:
    assert PairsSection(count=1, steps=50, solver="lcm").steps == 50
    with pytest.raises(ValueError, match="steps 51: an LCM knows 50 timesteps"):
        PairsSection(count=1, steps=51, solver="lcm")


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_turbo_model_draws_as_its_own_pipeline_does(turbo: Teacher, steps: int) -> None:
    """Euler without guidance, which SD-Turbo's pipeline is called with as guidance_scale = 0."""
    noise = noise_of(5, 6, 7)
    expected = pipeline_of(StableDiffusionPipeline, turbo, EulerDiscreteScheduler)(
        CAPTIONS, latents=torch.from_numpy(noise), num_inference_steps=steps, guidance_scale=0.0, output_type="latent"
    ).images.numpy()
    [found] = turbo.answer(Sample(noise, CAPTIONS, steps, 1.0, "euler"))
    assert np.abs(expected - noise).max() > 0.1
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2e-3, atol=5e-3)


def test_one_euler_step_by_hand(turbo: Teacher) -> None:
    """x0 = sigma (n - eps), with sigma = 14.6 that of t = 999, n the unit noise, and the network fed with n sigma / sqrt(sigma^2 + 1)."""
    noise = torch.from_numpy(noise_of(5, 6, 7))
    alpha_bar = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
    with torch.no_grad():
        fed = (noise * sigma / (sigma**2 + 1) ** 0.5).float()
        output = turbo.unet(fed, torch.full((3,), 999), **turbo.text.encode(CAPTIONS).arguments()).sample
        found = sample(turbo.guided(CAPTIONS, 1.0), noise, turbo.scheduler_config, 1, "euler")
    assert Diffusion(turbo.scheduler_config).prediction_type == "epsilon"
    np.testing.assert_allclose(found.numpy(), (sigma * (noise - output)).numpy(), rtol=1e-3, atol=1e-2)
