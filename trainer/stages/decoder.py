"""Stage 1: the tiny image decoder (eq. 5), on latents sampled from the teacher and the teacher decoder's images of them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.loop import Schedule, Stage, Trainable, channels_last
from trainer.objectives.decoder import discriminator_hinge, down8_l1, generator_hinge
from trainer.stages.context import Ahead, StageContext
from trainer.teacher import Decode, Request, compact


class PatchDiscriminator(nn.Module):
    """Patch logits of an image given its latent: three strided convolutions to the latent's resolution, joined there."""

    def __init__(self, latent_channels: int, width: int, downsamplings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for level in range(downsamplings):
            layers += [nn.Conv2d(channels, width << min(level, 2), 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels = width << min(level, 2)
        self.image = nn.Sequential(*layers)
        self.joined = nn.Sequential(
            nn.Conv2d(channels + latent_channels, channels, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(channels, 1, 1)
        )

    def forward(self, image_BCHW: Tensor, latent_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.joined(torch.cat([self.image(image_BCHW), latent_BCHW], dim=1))
        return logits


class DecoderStage(Stage):
    """Trains AutoencoderTiny's decoder by eq. 5 and, on the side, its encoder to invert the teacher's decoder."""

    def __init__(self, context: StageContext) -> None:
        section = context.recipe.decoder
        torch.manual_seed(context.recipe.seed)
        self.context, self.section, self.steps = context, section, section.steps
        self.vae = AutoencoderTiny(**section.config).to(memory_format=torch.channels_last)
        factor = 2 ** (len(section.config["decoder_block_out_channels"]) - 1)
        self.factor = factor
        self.discriminator = channels_last(
            PatchDiscriminator(section.config["latent_channels"], section.discriminator_width, factor.bit_length() - 1)
        )
        critic = Schedule(section.steps, section.discriminator_lr)
        self.trainables = {
            "vae": Trainable(self.vae, section.schedule(), weight_decay=0.0, ema_decay=section.ema),
            "discriminator": Trainable(self.discriminator, critic, betas=(0.5, 0.99), weight_decay=0.0),
        }
        self.ahead = Ahead(context.teacher, self._draw, section.steps)

    def _draw(self, index: int) -> tuple[Tensor, Request]:
        _, latent_BCHW, _ = self.context.pairs.draw(self.section.batch, self.context.generator(index))
        return latent_BCHW, Decode(compact(latent_BCHW))

    def step(self, index: int) -> dict[str, Tensor | float]:
        latent_BCHW, (target_BCHW,) = self.ahead.get(index)
        target_BCHW = target_BCHW.clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        output_BCHW = self.vae.decode(latent_BCHW).sample
        layout = down8_l1(output_BCHW, target_BCHW, self.factor)
        pixel = F.l1_loss(output_BCHW, target_BCHW)
        loss = layout + self.section.pixel_weight * pixel
        if self.section.encoder_weight:
            loss = loss + self.section.encoder_weight * F.mse_loss(self.vae.encode(target_BCHW).latents, latent_BCHW)
        metrics: dict[str, Tensor | float] = {"down8_l1": layout, "pixel_l1": pixel}
        if self.section.gan_weight and index >= self.section.gan_start:
            adversarial = generator_hinge(self.discriminator(output_BCHW, latent_BCHW))
            loss = loss + self.section.gan_weight * adversarial
            metrics["gan"] = adversarial
        self.trainables["vae"].update(loss, index)
        if "gan" in metrics:
            metrics["discriminator"] = self._train_discriminator(target_BCHW, output_BCHW.detach(), latent_BCHW, index)
        return {"loss": loss, **metrics}

    def _train_discriminator(self, real_BCHW: Tensor, fake_BCHW: Tensor, latent_BCHW: Tensor, index: int) -> Tensor:
        loss = discriminator_hinge(self.discriminator(real_BCHW, latent_BCHW), self.discriminator(fake_BCHW, latent_BCHW))
        self.trainables["discriminator"].update(loss, index)
        return loss

    def export(self, folder: Path) -> None:
        self.vae.load_state_dict(self.trainables["vae"].averaged())
        self.vae.save_pretrained(folder / "vae")
