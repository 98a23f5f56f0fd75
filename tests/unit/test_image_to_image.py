"""Image to image in one step, against diffusers' schedulers and pipelines."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from sdxs import Control, controlnet
from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.image_to_image import Init, Levels
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.stages import Encoder
from tests.models import tiny_controlnet, tiny_folder

SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
DDIM: dict[str, Any] = {**SD, "clip_sample": False, "set_alpha_to_one": True}
PROMPT, SEED = "red apple", 5
PICTURE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png(image_HWC: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", image_HWC[..., ::-1])[1])


@pytest.fixture(scope="module")
def ours(tiny_bundle: Path) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(tiny_bundle)


def by_hand(folder: Path, t: int) -> np.ndarray:
    """x0 of one evaluation at t, in float32: the scheduler adds the noise and reads the output."""
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    scheduler.set_timesteps(1)
    vae = AutoencoderTiny.from_pretrained(folder / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    pixels_BCHW = torch.from_numpy(PICTURE.copy()).permute(2, 0, 1)[None].float() / 255
    noise_BCHW = torch.from_numpy(latent_noise(SEED, (8, 4, 4)))[None]
    text_BLD = torch.from_numpy(OneStepPipeline.from_bundle(folder).text_encoder.encode([PROMPT]).text_BLD)
    with torch.no_grad():
        clean_BCHW = vae.encode(pixels_BCHW * 2 - 1).latents * vae.config.scaling_factor
        noisy_BCHW = scheduler.add_noise(clean_BCHW, noise_BCHW, torch.tensor([t]))
        output_BCHW = unet(noisy_BCHW, t, text_BLD).sample
        x0_BCHW = scheduler.step(output_BCHW, t, noisy_BCHW).pred_original_sample
        image_BCHW = vae.decode(x0_BCHW / vae.config.scaling_factor).sample
    image: np.ndarray = (image_BCHW[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255
    return image


SCHEDULERS: dict[str, Any] = {
    "v": lambda: DDIMScheduler(**DDIM, prediction_type="v_prediction"),
    "eps": lambda: DDIMScheduler(**DDIM),
    "sample": lambda: DDIMScheduler(**DDIM, prediction_type="sample"),
    "euler": lambda: EulerDiscreteScheduler(**SD),
    "another schedule": lambda: DDIMScheduler(
        **(DDIM | {"beta_schedule": "squaredcos_cap_v2"}), prediction_type="v_prediction"
    ),
    "no signal at the end": lambda: DDIMScheduler(**DDIM, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_equals_one_evaluation_by_hand(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "m", SCHEDULERS[name]())
    ours = OneStepPipeline.from_bundle(folder)
    last = ours.manifest.one_step.timestep
    for strength in (0.1, 0.45, 0.9):
        made = np.asarray(ours(PROMPT, SEED, init_image=png(PICTURE), strength=strength)[0])
        expected = by_hand(folder, round(strength * last))
        assert np.abs(made - expected).max() <= 0.5 + 0.255  # 1e-3 of the range, and rounding


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_equals_diffusers_where_it_takes_one_step(tiny_bundle: Path, ours: OneStepPipeline, steps: int) -> None:
    """Its last of 2 steps from strength 1/2, of 4 from 1/4, of 10 from 1/10, goes from t = 1000 / steps - 1 to x0."""
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_bundle, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    made = theirs(
        PROMPT, image=PIL.Image.fromarray(PICTURE), strength=1 / steps, num_inference_steps=steps, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(SEED), output_type="latent",
    ).images  # fmt: skip
    noise_BCHW = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(SEED)).numpy()
    t = 1000 // steps - 1
    clean_BCHW = Encoder.from_bundle(tiny_bundle, Settings()).encode(PICTURE[None])
    found = ours.unet.denoise(noise_BCHW, ours.text_encoder.encode([PROMPT]), None, [Init(clean_BCHW[0], t / 999)])
    assert np.abs(found - made.numpy()).max() < 1e-3


def test_equals_diffusers_with_a_control(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    place = tiny_controlnet(UNet2DConditionModel.from_pretrained(folder / "unet"), folder / "controlnet" / "edge", 0)
    theirs = StableDiffusionControlNetImg2ImgPipeline.from_pretrained(folder, controlnet=controlnet.load(place))
    theirs.set_progress_bar_config(disable=True)
    map_HWC = PICTURE[::-1].copy()
    made = theirs(
        PROMPT, image=PIL.Image.fromarray(PICTURE), control_image=PIL.Image.fromarray(map_HWC), strength=0.5, num_inference_steps=2,
        guidance_scale=0.0, generator=torch.Generator().manual_seed(SEED), controlnet_conditioning_scale=0.8, output_type="latent",
    ).images  # fmt: skip
    ours = OneStepPipeline.from_bundle(folder)
    noise_BCHW = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(SEED)).numpy()
    inits = [Init(Encoder.from_bundle(folder, Settings()).encode(PICTURE[None])[0], 499 / 999)]
    text, asked = ours.text_encoder.encode([PROMPT]), Control(b"", controlnet="edge", scale=0.8)
    assert ours.controlnets is not None
    weights_BR = ours.controlnets.weights(asked)[None]
    added = ours.controlnets.residuals(noise_BCHW, text, map_HWC[None], "edge", weights_BR, inits)
    assert np.abs(ours.unet.denoise(noise_BCHW, text, added, inits) - made.numpy()).max() < 1e-3
    assert np.abs(ours.unet.denoise(noise_BCHW, text, None, inits) - made.numpy()).max() > 0.1
    both = ours(
        PROMPT, SEED, controls=[Control(png(map_HWC), "", "edge", preprocessed=True)], init_image=png(PICTURE), strength=0.5
    )
    assert np.asarray(both[0]).shape == (32, 32, 3)


def test_strength_1_is_text_to_image(ours: OneStepPipeline) -> None:
    plain = np.asarray(ours(PROMPT, SEED)[0])
    np.testing.assert_array_equal(np.asarray(ours(PROMPT, SEED, init_image=png(PICTURE), strength=1.0)[0]), plain)
    assert (np.asarray(ours(PROMPT, SEED, init_image=png(PICTURE), strength=0.9)[0]) != plain).any()


def test_rows_of_a_batch_start_where_each_says(ours: OneStepPipeline) -> None:
    noise_BCHW = np.stack([latent_noise(seed, (8, 4, 4)) for seed in range(4)])
    latent_CHW = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float32)
    inits = [None, Init(latent_CHW, 0.3), Init(-latent_CHW, 0.8), Init(latent_CHW, 1.0)]
    text = ours.text_encoder.encode([PROMPT] * 4)
    together = ours.unet.denoise(noise_BCHW, text, None, inits)
    for i, init in enumerate(inits):
        alone = ours.unet.denoise(noise_BCHW[i : i + 1], text.rows()[i], None, [init])
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-4)
    np.testing.assert_allclose(together[[0, 3]], ours.unet.denoise(noise_BCHW, text)[[0, 3]], atol=1e-4)


def test_the_image_is_resized_to_the_models(ours: OneStepPipeline) -> None:
    large = np.repeat(np.repeat(PICTURE, 3, 0), 2, 1)
    small = np.asarray(PIL.Image.fromarray(large).resize((32, 32), PIL.Image.Resampling.LANCZOS))
    made = [np.asarray(ours(PROMPT, SEED, init_image=png(image), strength=0.2)[0]) for image in (large, small)]
    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize("name", ["tiny", "kl"])
def test_the_encoder_is_the_autoencoders(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    if name == "tiny":
        AutoencoderTiny(latent_channels=8, scaling_factor=0.5, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(tmp_path / "vae")  # fmt: skip
    else:
        AutoencoderKL(latent_channels=8, block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1, scaling_factor=0.18215,
                      down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                      ).save_pretrained(tmp_path / "vae")  # fmt: skip
    kind = AutoencoderTiny if name == "tiny" else AutoencoderKL
    network = kind.from_pretrained(tmp_path / "vae").eval()
    image_BCHW = torch.from_numpy(PICTURE.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        found = network.encode(image_BCHW)
    expected = found.latents * 0.5 if name == "tiny" else found.latent_dist.mode() * 0.18215
    np.testing.assert_allclose(Encoder.from_bundle(tmp_path, Settings()).encode(PICTURE[None]), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan")])
def test_a_strength_out_of_range_is_refused(ours: OneStepPipeline, strength: float) -> None:
    with pytest.raises(InvalidRequest, match="above 0, at most 1") as caught:
        ours(PROMPT, init_image=png(PICTURE), strength=strength)
    assert caught.value.field == "strength"


def test_a_strength_of_nothing_is_refused(ours: OneStepPipeline) -> None:
    with pytest.raises(InvalidRequest, match=r"strength: got 0\.5, allowed: none without an init_image"):
        ours(PROMPT, strength=0.5)


def test_an_init_image_that_is_none_is_refused(ours: OneStepPipeline) -> None:
    with pytest.raises(InvalidRequest, match="init_image"):
        ours(PROMPT, init_image=b"GIF89a", strength=0.5)


def test_a_model_that_cannot_encode_says_so_when_asked(tiny_bundle: Path, tmp_path: Path) -> None:
    """Bundles with a decoder alone make images from text as ever."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "m"))
    (folder / "bundle.json").unlink()
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k.startswith("decoder.")}, weights, {"format": "pt"})
    ours = OneStepPipeline.from_bundle(folder)
    assert len(ours(PROMPT)) == 1
    with pytest.raises(PreconditionFailed, match="image to image: this model has no image encoder"):
        ours(PROMPT, init_image=png(PICTURE), strength=0.5)


def test_an_output_of_unknown_meaning_is_refused() -> None:
    with pytest.raises(PreconditionFailed, match="'flow_prediction'"):
        Levels(np.ones(1), np.ones(1), "flow_prediction").coefficients(0)


def test_less_strength_stays_closer() -> None:
    """The shipped model: the mean distance to an image of its own grows with the strength."""
    emoji = OneStepPipeline.from_bundle("emoji")
    start = np.asarray(emoji("red apple", 1)[0]).astype(float)
    distances = []
    for strength in (0.2, 0.5, 0.8, 1.0):
        made = emoji("green apple", 7, 4, init_image=png(start.astype(np.uint8)), strength=strength)
        distances.append(np.mean([np.abs(np.asarray(image) - start).mean() for image in made]))
    assert distances[0] < 0.6 * distances[-1]
    assert all(nearer < further for nearer, further in pairwise(distances))
