"""Whitening: folded into the autoencoder exactly; its latents then have mean 0 and standard deviation 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trainer.sections import AutoencoderSection
from trainer.stages.autoencoder import AutoencoderStage, whiten
from trainer.teacher_stages import world_source
from trainer.worlds.base import get_world

CONFIG: dict[str, Any] = {
    "latent_channels": 3, "block_out_channels": (4, 8, 8), "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "mid_block_add_attention": False,
}  # fmt: skip


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**CONFIG).double().eval()


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_whitening_changes_the_latents_and_not_the_images(vae: AutoencoderKL) -> None:
    image_BCHW = images()
    before = vae.encode(image_BCHW).latent_dist
    decoded = vae.decode(before.mean).sample
    mean_C, std_C = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
    assert (mean_C.abs() > 1e-3).all() and ((std_C - 1).abs() > 0.1).all()
    whiten(vae, mean_C, std_C)
    after = vae.encode(image_BCHW).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(3).double())
    torch.testing.assert_close(after.std, before.std / std_C.view(1, -1, 1, 1))  # posterior noise is scaled alike
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded)


@torch.no_grad()
def test_channels_are_whitened_one_by_one(vae: AutoencoderKL) -> None:
    before = vae.encode(images()).latent_dist.mean
    mean_C, std_C = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([0.1, 3.0, 7.0]).double()
    whiten(vae, mean_C, std_C)
    after = vae.encode(images()).latent_dist.mean
    for channel in range(3):
        torch.testing.assert_close(after[:, channel], (before[:, channel] - mean_C[channel]) / std_C[channel])


def test_a_trained_autoencoder_is_exported_white(tmp_path: Path) -> None:
    torch.manual_seed(0)
    section = AutoencoderSection(steps=3, batch=4, lr=1e-3, ema=0.9, config=CONFIG)
    source = world_source(get_world("scenes"))
    stage = AutoencoderStage(section, source, seed=0)
    losses = [float(torch.as_tensor(stage.step(index)["loss"]).detach()) for index in range(3)]
    assert all(0 < loss < 20 for loss in losses)
    stage.export(tmp_path)
    exported = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert exported.config.scaling_factor == 1.0
    with torch.no_grad():
        latent_BCHW = exported.encode(source(400, torch.Generator().manual_seed(9))).latent_dist.mean  # other images
    torch.testing.assert_close(latent_BCHW.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=0.15)
    torch.testing.assert_close(latent_BCHW.std((0, 2, 3)), torch.ones(3), rtol=0, atol=0.15)
