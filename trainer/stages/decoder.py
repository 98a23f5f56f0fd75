"""The tiny image decoder (eq. 5), on latents sampled from the teacher and the teacher decoder's images of them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.loop import Stage
from trainer.objectives.decoder import down8_l1
from trainer.objectives.gan import discriminator_hinge, generator_hinge
from trainer.optimisation import Losses, Trainable, stage_trainable
from trainer.placement import Deal, Turn, frozen
from trainer.recipe import DistillRecipe
from trainer.schedule import Schedule
from trainer.stages.context import Ahead, StageContext, save_network
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


class TinyCoder(nn.Module):
    """Both halves of AutoencoderTiny in one forward call, which data-parallel training needs."""

    def __init__(self, vae: AutoencoderTiny, encodes: bool) -> None:
        super().__init__()
        self.vae, self.encodes = vae, encodes
        if not encodes:
            vae.encoder.requires_grad_(False)

    def forward(self, latent_BCHW: Tensor, image_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        decoded: Tensor = self.vae.decode(latent_BCHW.contiguous(memory_format=torch.channels_last)).sample
        return decoded, self.vae.encode(image_BCHW).latents if self.encodes else None


class DecoderStage(Stage):
    """Trains AutoencoderTiny's decoder by eq. 5 and, on the side, its encoder to invert the teacher's decoder."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.recipe, DistillRecipe)
        section, placement = context.recipe.decoder, context.placement
        torch.manual_seed(context.recipe.seed)
        self.context, self.section, self.steps, self.deal = context, section, section.steps, Deal.of(section)
        self.vae = AutoencoderTiny(**section.config)
        self.factor = 2 ** (len(section.config["decoder_block_out_channels"]) - 1)
        self.discriminator = PatchDiscriminator(
            section.config["latent_channels"], section.discriminator_width, self.factor.bit_length() - 1
        )
        coder = TinyCoder(self.vae, bool(section.encoder_weight))
        self.trainables = {
            "vae": stage_trainable(coder, section, placement, weight_decay=0.0),
            "discriminator": Trainable(
                placement.place(self.discriminator), Schedule(section.steps, section.discriminator_lr), betas=(0.5, 0.99),
                weight_decay=0.0, placement=placement,
            ),
        }  # fmt: skip
        self.ahead = Ahead(context.teacher, self._draw, section.steps * self.deal.rounds)
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # of this step: target, output, latent

    def _draw(self, number: int) -> tuple[Tensor, Request]:
        latent_BCHW = self.context.draw(self.deal.turn(number), self.deal.size).target_BCHW
        return latent_BCHW, Decode(compact(latent_BCHW))

    def step(self, index: int) -> Losses:
        turns, self._seen = self.deal.turns(index), []
        metrics = self.trainables["vae"].learn(turns, self._losses)
        if "gan" in metrics:
            found = self.trainables["discriminator"].learn(turns, self._discriminator_loss)
            metrics["discriminator"] = found["loss"]
        return metrics

    def _losses(self, turn: Turn) -> Losses:
        latent_BCHW, (target_BCHW,) = self.ahead.get(turn.sequence)
        target_BCHW = target_BCHW.clamp(-1, 1).to(latent_BCHW.device, memory_format=torch.channels_last)
        with self.context.placement.autocast():
            output_BCHW, encoded_BCHW = self.trainables["vae"].module(latent_BCHW, target_BCHW)
        output_BCHW = output_BCHW.float()
        layout, pixel = down8_l1(output_BCHW, target_BCHW, self.factor), F.l1_loss(output_BCHW, target_BCHW)
        loss = layout + self.section.pixel_weight * pixel
        if encoded_BCHW is not None:
            loss = loss + self.section.encoder_weight * F.mse_loss(encoded_BCHW.float(), latent_BCHW)
        losses: Losses = {"down8_l1": layout, "pixel_l1": pixel}
        if self.section.gan_weight and turn.index >= self.section.gan_start:
            with frozen(self.discriminator):
                losses["gan"] = generator_hinge([self.discriminator(output_BCHW, latent_BCHW)])
            loss = loss + self.section.gan_weight * losses["gan"]
            self._seen.append((target_BCHW, output_BCHW.detach(), latent_BCHW))
        return {"loss": loss, **losses}

    def _discriminator_loss(self, turn: Turn) -> Losses:
        real_BCHW, fake_BCHW, latent_BCHW = self._seen[turn.sequence % self.deal.rounds]
        judge = self.trainables["discriminator"].module
        return {"loss": discriminator_hinge([judge(real_BCHW, latent_BCHW)], [judge(fake_BCHW, latent_BCHW)])}

    def export(self, folder: Path) -> None:
        weights = {name.removeprefix("vae."): value for name, value in self.trainables["vae"].averaged().items()}
        save_network(AutoencoderTiny, self.vae.config, weights, folder / "vae")
