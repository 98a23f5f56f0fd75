"""A LoRA learnt on the spot: it paints the emoji model's pictures red, halfway at half the scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sdxs import Lora
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.registry import packaged
from sdxs.stages import UNet
from trainer.models import lora

RANK, STEPS, BATCH = 4, 32, 4
CAPTIONS = ["red apple", "dog face", "thumbs up", "grinning face", "automobile", "sun", "tree", "fish"]


def tinted(image_BCHW: torch.Tensor) -> torch.Tensor:
    """Of images in [-1, 1]: half as bright, and red."""
    return image_BCHW * 0.5 + torch.tensor([0.5, -0.5, -0.5])[:, None, None]


def redness(image: np.ndarray) -> float:
    """Mean of red over that of green and blue, in levels of 255."""
    red, green, blue = np.asarray(image, np.float64).reshape(-1, 3).mean(0)
    return float(red - (green + blue) / 2)


def drawn(unet: UNet, network: torch.nn.Module, text_BLD: torch.Tensor, seeds: range) -> torch.Tensor:
    """x0 = a noise + b unet(c noise), with gradients."""
    one, noise = unet.constants, torch.from_numpy(np.stack([latent_noise(seed, unet.latent_shape) for seed in seeds]))
    output = network(one.input_scale * noise, one.timestep, text_BLD, return_dict=False)[0]
    x0: torch.Tensor = one.latent_coefficient * noise + one.output_coefficient * output
    return x0


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learnt through the decoder: the student's own pictures, tinted."""
    pipeline = OneStepPipeline.from_bundle(packaged()["emoji"])
    network, decoder = pipeline.unet.network, pipeline.decoder.network
    lora.attach(network, RANK, targets=(*lora.EVERYWHERE, "conv_out"))
    learnt = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=5e-3)
    text = {caption: torch.from_numpy(pipeline.text_encoder.encode([caption]).text_BLD[0]) for caption in CAPTIONS}
    for step in range(STEPS):
        few, seeds = CAPTIONS[step % 2 :: 2], range(step * BATCH, (step + 1) * BATCH)
        text_BLD = torch.stack([text[caption] for caption in few])
        network.disable_adapters()
        with torch.no_grad():
            wanted = tinted(decoder.decode(drawn(pipeline.unet, network, text_BLD, seeds)).sample.clamp(-1, 1))
        network.enable_adapters()
        loss = F.mse_loss(decoder.decode(drawn(pipeline.unet, network, text_BLD, seeds)).sample, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("red")
    lora.save_adapter(network.state_dict(), folder, RANK)
    return folder


@pytest.mark.timeout(300)
def test_a_learnt_style_colours_the_pictures_by_its_scale(style: Path, tmp_path: Path) -> None:
    pipeline = OneStepPipeline.from_bundle(packaged()["emoji"])

    def pictures(loras: list[Lora]) -> np.ndarray:
        return np.stack([np.asarray(pipeline(caption, 900 + i, loras=loras)[0]) for i, caption in enumerate(CAPTIONS)])

    plain, half, whole, away = (pictures(loras) for loras in ([], [Lora(style, 0.5)], [Lora(style)], [Lora(style, -0.5)]))
    assert redness(plain) + 15 < redness(half) < redness(whole) - 15
    assert redness(whole) - redness(plain) > 60, "136 against 31 after twice as much"
    assert redness(away) < redness(plain) - 15
    assert (pictures([]) == plain).all()
