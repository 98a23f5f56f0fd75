"""The one-step pipeline against diffusers' own, on the same random weights and noise."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from sdxs import bundle, registry
from sdxs.errors import CorruptArtifact, InvalidRequest
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.stages import Decoder, TextEncoder, UNet
from tests.models import tiny_folder

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM: dict[str, Any] = {**SD, "clip_sample": False, "timestep_spacing": "trailing"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim-eps": lambda: DDIMScheduler(**DDIM),
    "ddim-v": lambda: DDIMScheduler(**DDIM, prediction_type="v_prediction"),
    "euler": lambda: EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "euler-v": lambda: EulerDiscreteScheduler(**SD, timestep_spacing="trailing", prediction_type="v_prediction"),
    "deis": lambda: DEISMultistepScheduler(**SD),
    "dpm": lambda: DPMSolverMultistepScheduler(**SD),
}
PROMPTS = ["red apple", "thumbs up"]


def reference(folder: Path, prompt: str, noise_CHW: np.ndarray, kind: str) -> np.ndarray:
    """What StableDiffusionPipeline makes of one step without guidance."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise_CHW)[None].clone()
    made = pipeline(prompt, num_inference_steps=1, guidance_scale=0.0, latents=latents, output_type=kind).images
    return np.asarray(made)


def equal(folder: Path) -> None:
    """Latents and images of both pipelines differ by less than 1e-3, and the pixels by one step of 255 at the most."""
    bundle.seal(folder, "parity")
    ours = OneStepPipeline.from_bundle(folder)
    for seed, prompt in enumerate(PROMPTS):
        noise_CHW = latent_noise(seed, ours.unet.latent_shape)
        latent_BCHW = ours.unet.denoise(noise_CHW[None], ours.text_encoder.encode([prompt]))
        assert np.abs(latent_BCHW - reference(folder, prompt, noise_CHW, "latent")).max() < 1e-3
        expected_BHWC = reference(folder, prompt, noise_CHW, "np")
        assert np.abs(ours.decoder.paint(latent_BCHW) - expected_BHWC).max() < 1e-3
        pixels = np.asarray(ours(prompt, seed)[0]).astype(int)
        assert np.abs(pixels - np.asarray(reference(folder, prompt, noise_CHW, "pil")[0]).astype(int)).max() <= 1
        assert expected_BHWC.std() > 0.01  # not a blank picture


@pytest.mark.parametrize("name", SCHEDULERS)
def test_equals_diffusers_with_any_scheduler(tmp_path: Path, name: str) -> None:
    equal(tiny_folder(tmp_path / "m", SCHEDULERS[name]()))


@pytest.mark.parametrize("scaling_factor", [1.0, 0.18215])
def test_equals_diffusers_with_a_kl_decoder(tmp_path: Path, scaling_factor: float) -> None:
    folder = tiny_folder(tmp_path / "m")
    AutoencoderKL(
        latent_channels=8, block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=scaling_factor,
    ).save_pretrained(folder / "vae")  # fmt: skip
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("AutoencoderTiny", "AutoencoderKL"))
    equal(folder)


def test_equals_diffusers_with_text_embedded_in_time(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    UNet2DConditionModel(
        sample_size=4, in_channels=8, out_channels=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8, resnet_time_scale_shift="scale_shift",
        addition_embed_type="text", addition_embed_type_num_heads=2,
    ).save_pretrained(folder / "unet")  # fmt: skip
    equal(folder)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(tiny_bundle)


def test_same_seed_same_image_whatever_else_is_asked(pipeline: OneStepPipeline) -> None:
    four = [np.asarray(image) for image in pipeline("red apple", seed=5, n=4)]
    for i, image in enumerate(four):
        np.testing.assert_array_equal(image, np.asarray(pipeline("red apple", seed=5 + i)[0]))
    assert any((four[0] != other).any() for other in four[1:])
    both = pipeline(["thumbs up", "red apple"], seed=5)
    np.testing.assert_array_equal(np.asarray(both[1]), four[0])


def test_a_batch_is_within_one_step_of_255(pipeline: OneStepPipeline) -> None:
    prompts = pipeline.text_encoder.encode(PROMPTS * 2)
    noise_BCHW = np.stack([latent_noise(seed, pipeline.unet.latent_shape) for seed in range(4)])
    batch = pipeline.decoder.decode(pipeline.unet.denoise(noise_BCHW, prompts)).astype(int)
    for seed, prompt in enumerate(PROMPTS * 2):
        assert np.abs(batch[seed] - pipeline.generate(prompt, seed)).max() <= 1


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [("", {}, "prompt"), (" \n", {}, "prompt"), ("apple " * 20, {}, "prompt"), ("a", {"n": 0}, "n"), ("a", {"seed": -1}, "seed"),
     ("a", {"seed": 2**64}, "seed")],
)  # fmt: skip
def test_bad_requests_name_the_field(pipeline: OneStepPipeline, prompt: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pipeline(prompt, **options)
    assert caught.value.field == field


def test_the_longest_prompt_is_read_whole(pipeline: OneStepPipeline) -> None:
    longest = "a" * 14  # and start and end make 16
    pipeline.text_encoder.check(longest)
    with pytest.raises(InvalidRequest, match="this has 17"):
        pipeline.text_encoder.check(longest + "b")


def test_each_stage_loads_its_own_folder_and_no_network(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("loading a bundle opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    stages: list[tuple[Any, tuple[str, ...]]] = [
        (TextEncoder, ("tokenizer", "text_encoder")), (UNet, ("unet",)), (Decoder, ("vae",)),
    ]  # fmt: skip
    for stage, folders in stages:
        part = tmp_path / stage.__name__
        for name in folders:
            shutil.copytree(tiny_bundle / name, part / name)
        shutil.copy(tiny_bundle / "bundle.json", part)
        stage.from_bundle(part, Settings())


def test_a_plain_published_folder_works(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "SDXS plain")
    images = OneStepPipeline.from_bundle(folder)("red apple", seed=3)
    bundle.seal(folder, "sealed")
    np.testing.assert_array_equal(
        np.asarray(images[0]), np.asarray(OneStepPipeline.from_bundle(folder)("red apple", seed=3)[0])
    )


def test_a_path_is_a_folder_whatever_its_name(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "emoji")
    monkeypatch.chdir(tmp_path)
    assert OneStepPipeline.from_bundle(Path("./emoji")).manifest.name == "tiny"


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CorruptArtifact, match=r"unet lacks 1 weights of its UNet2DConditionModel, among them conv_in\.weight"):
        OneStepPipeline.from_bundle(folder)


def test_threads_may_load_at_once(tiny_bundle: Path) -> None:
    """As a server does with two models. The libraries make modules without memory for a moment, in whichever thread."""
    with ThreadPoolExecutor(8) as threads:
        loaded = list(threads.map(lambda _: OneStepPipeline.from_bundle(tiny_bundle), range(24)))
    assert len({pipeline("red apple", seed=1)[0].tobytes() for pipeline in loaded}) == 1


def test_an_unknown_decoder_class_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderTiny", "DiffusionPipeline"))
    with pytest.raises((InvalidRequest, CorruptArtifact), match="DiffusionPipeline"):
        OneStepPipeline.from_bundle(folder)


def test_a_path_is_a_folder_and_never_a_name(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle in ./emoji must not be taken for the one that ships under that name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle, tmp_path / "emoji")
    for reference in (Path("emoji"), Path("./emoji"), "./emoji"):
        assert OneStepPipeline.from_bundle(reference).manifest.name == "tiny"
    folder, _ = registry.open_model("./emoji", Settings())
    assert folder == tmp_path / "emoji"  # absolute: a replica elsewhere opens the same


@pytest.mark.timeout(60)
def test_prompts_are_checked_while_others_are_encoded(tiny_bundle: Path) -> None:
    """A tokenizer's padding belongs to the object: one that counted for another thread gave an embedding of the prompt's own length."""
    encoder = TextEncoder.from_bundle(tiny_bundle, Settings())
    wanted = encoder.encode(["red apple"]).text_BLD.shape
    ended = threading.Event()

    def check() -> None:
        while not ended.is_set():
            encoder.check("red apple")

    thread = threading.Thread(target=check)
    thread.start()
    try:
        assert {encoder.encode(["red apple"]).text_BLD.shape for _ in range(2000)} == {wanted}
    finally:
        ended.set()
        thread.join()
