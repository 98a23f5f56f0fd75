"""Teacher, part 1: the KL autoencoder (f=8) whose latents everything else lives in. Not part of the paper: the teacher is given there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trainer.loop import Stage, step_generator
from trainer.objectives.decoder import down8_l1
from trainer.objectives.reconstruction import gradient_l1, kl_per_element, opponent_l1
from trainer.optimisation import Trainable
from trainer.sections import AutoencoderSection

ImageBatch = Callable[[int, torch.Generator], Tensor]


class AutoencoderStage(Stage):
    """L1 + L2 + image-gradient L1 + layout L1 + a small KL term; exported with whitened latents.

    The recipe's `layout` weighs the L1 between images averaged over 8x8 blocks, `colour` the L1 of opponent colours: without them
    rare colours (green, purple) stay grey for thousands of steps.

    Args:
        images: draws a batch of images in [-1, 1], shape (B, 3, H, W).
    """

    def __init__(self, section: AutoencoderSection, images: ImageBatch, seed: int) -> None:
        torch.manual_seed(seed)
        self.section, self.images, self.seed, self.steps = section, images, seed, section.steps
        self.vae = AutoencoderKL(**section.config).to(memory_format=torch.channels_last)
        self.trainables = {"vae": Trainable(self.vae, section.schedule(), weight_decay=0.0, ema_decay=section.ema)}

    def step(self, index: int) -> dict[str, Tensor | float]:
        generator = step_generator(self.seed, index)
        image_BCHW = self.images(self.section.batch, generator).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(image_BCHW).latent_dist
        latent_BCHW = posterior.sample(generator)
        output_BCHW = self.vae.decode(latent_BCHW).sample
        error = output_BCHW - image_BCHW
        mse = error.square().mean()
        kl = kl_per_element(posterior.mean, posterior.logvar)
        loss = error.abs().mean() + mse + 0.5 * gradient_l1(output_BCHW, image_BCHW)
        layout = down8_l1(output_BCHW, image_BCHW)
        colour = opponent_l1(output_BCHW, image_BCHW)
        loss = loss + self.section.layout * layout + self.section.colour * colour + self.section.kl * kl
        norm = self.trainables["vae"].update(loss, index)
        psnr = 10 * torch.log10(4.0 / mse.detach())
        return {"loss": loss, "psnr_db": psnr, "layout_l1": layout, "colour_l1": colour, "kl": kl, "gradient_norm": norm}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write `vae/`, its latents whitened per channel; scaling_factor is then 1."""
        self.vae.load_state_dict(self.trainables["vae"].averaged())
        image_BCHW = self.images(512, step_generator(self.seed, self.steps))
        latent_BCHW = torch.cat([self.vae.encode(part).latent_dist.mean for part in image_BCHW.split(32)])
        whiten(self.vae, latent_BCHW.mean((0, 2, 3)), latent_BCHW.std((0, 2, 3)))
        self.vae.register_to_config(scaling_factor=1.0, force_upcast=False)
        self.vae.save_pretrained(folder / "vae")


@torch.no_grad()
def whiten(vae: AutoencoderKL, mean_C: Tensor, std_C: Tensor) -> None:
    """Fold z -> (z - mean) / std into the encoder's last 1x1 convolution and its inverse into the decoder's first.

    Exact, since both are linear: diffusers pipelines know one scaling factor only, a whitened autoencoder needs none.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean_C)
    quant.weight[:channels] /= std_C.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean_C) / std_C
    quant.bias[channels:] -= 2 * std_C.log()  # the second half is log-variance
    post.bias += post.weight[:, :, 0, 0] @ mean_C
    post.weight *= std_C.view(1, -1, 1, 1)
