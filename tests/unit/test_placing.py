"""Where networks compute and in what, and that arrays come and go as float32 whatever that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from sdxs import bundle
from sdxs.control import Control
from sdxs.errors import InvalidRequest
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.stages import Decoder, place
from tests.models import tiny_controlnet, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_folder(tmp_path_factory.mktemp("placing") / "bundle")
    unet = OneStepPipeline.from_bundle(made).unet.network
    tiny_controlnet(unet, made / "controlnet" / "edge", seed=1)
    bundle.seal(made, "placing")
    return made


def test_without_a_gpu_the_cpu_in_float32_and_any_type_that_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert place(Settings()) == (torch.device("cpu"), torch.float32)
    assert place(Settings(torch_dtype="bfloat16")) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(InvalidRequest, match=r"SDXS_TORCH_DEVICE.*one of 0 GPUs"):
        place(Settings(torch_device="cuda"))


@pytest.mark.parametrize(("visible", "device", "expected"), [
    (2, "", (torch.device("cuda"), torch.float16)), (2, "cuda:1", (torch.device("cuda", 1), torch.float16)),
    (2, "cpu", (torch.device("cpu"), torch.float32)), (1, "cuda:1", None),
])  # fmt: skip
def test_a_gpu_that_is_seen_is_used_in_float16(
    monkeypatch: pytest.MonkeyPatch, visible: int, device: str, expected: tuple[torch.device, torch.dtype] | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if expected is None:
        with pytest.raises(InvalidRequest, match="one of 1 GPUs"):
            place(Settings(torch_device=device))
    else:
        assert place(Settings(torch_device=device)) == expected


@pytest.mark.parametrize("name", ["torch_device", "torch_dtype"])
def test_what_is_neither_device_nor_type_names_its_variable(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"SDXS_{name.upper()}"):
        Settings(**{name: "tpu"})


def test_networks_of_another_type_are_given_it_and_their_results_are_float32(folder: Path) -> None:
    """All stages, a ControlNet and image to image among them: in bfloat16 near what float32 makes."""
    whole, half = (OneStepPipeline.from_bundle(folder, Settings(torch_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert half.controlnets is not None
    networks: list[nn.Module] = [half.unet.network, half.decoder.network, half.controlnets.networks["edge"]]
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
    noise_BCHW = latent_noise(1, whole.unet.latent_shape)[None]
    prompts = [pipeline.text_encoder.encode(["red apple"]) for pipeline in (whole, half)]
    latents = [pipeline.unet.denoise(noise_BCHW, text) for pipeline, text in zip((whole, half), prompts, strict=True)]
    assert all(found.dtype == np.float32 for found in (*latents, *(text.text_BLD for text in prompts)))
    assert 0 < np.abs(latents[0] - latents[1]).max() < 0.1 * np.abs(latents[0]).max()
    assert half.decoder.paint(latents[1]).dtype == np.float32
    file = folder / "map.png"
    whole("red apple", seed=3)[0].save(file)
    options: dict[str, Any] = {
        "controls": [Control(file.read_bytes(), "edge")],
        "init_image": file.read_bytes(),
        "strength": 0.5,
    }
    images = [np.asarray(pipeline("blue star", seed=2, **options)[0]).astype(int) for pipeline in (whole, half)]
    assert 0 < np.abs(images[0] - images[1]).mean() < 8


def test_a_large_autoencoder_stays_in_float32(tmp_path: Path) -> None:
    """SDXL's overflows in float16."""
    made = tiny_folder(tmp_path / "bundle")
    AutoencoderKL(latent_channels=8, block_out_channels=(8,) * 4, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(made / "vae")  # fmt: skip
    bundle.seal(made, "large")
    assert Decoder.from_bundle(made, Settings(torch_dtype="bfloat16")).network.dtype == torch.float32
