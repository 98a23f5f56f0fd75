"""A ControlNet for the multi-step teacher (arXiv:2302.05543): its U-Net frozen, the denoising loss under a condition map of each image."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from sdxs.settings import Settings
from trainer.conditions import condition_maps
from trainer.data.latent_cache import cached_pixels
from trainer.diffusion import Diffusion, stratified_timesteps
from trainer.loop import Stage, step_generator
from trainer.models.controlnets import Controlled, from_unet
from trainer.models.judge import to_tensor
from trainer.optimisation import Losses, stage_trainable
from trainer.placement import Deal, Turn
from trainer.real_images import encoded_images
from trainer.recipe import ControlNetRecipe
from trainer.sections import ControlNetSection
from trainer.sources import load_frozen
from trainer.stages.context import Predictor, StageContext, save_student
from trainer.warps import warped
from trainer.worlds.base import get_world

VIEWS_SEED = 7


class Views(Protocol):
    """Captioned images with their latents."""

    def __len__(self) -> int: ...

    def take(self, rows: list[int]) -> tuple[np.ndarray, Tensor, list[str]]:
        """image_BHWC in uint8, latent_BCHW in float32, and captions."""
        ...


class WorldViews:
    """Random views of a world, encoded when first asked for."""

    def __init__(self, name: str, section: ControlNetSection, vae: AutoencoderKL, seed: int) -> None:
        rng = np.random.default_rng([seed, VIEWS_SEED])
        images, self.captions = get_world(name).training_images(section.views, rng)
        if section.warp:
            images = np.stack([warped(image, rng, section.warp) for image in images])
        with torch.no_grad():
            parts = [vae.encode(to_tensor(part)).latent_dist.mean for part in np.array_split(images, -(-len(images) // 64))]
        self.image_NHWC, self.latent_NCHW = images, (torch.cat(parts) * vae.config.scaling_factor).half()

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: list[int]) -> tuple[np.ndarray, Tensor, list[str]]:
        return self.image_NHWC[rows], self.latent_NCHW[rows].float(), [self.captions[row] for row in rows]


class CapturedViews:
    """Captioned images of a data set, encoded by the teacher pool before."""

    def __init__(self, recipe: ControlNetRecipe, settings: Settings) -> None:
        section = recipe.controlnet.images
        assert section is not None
        self.latents, self.pixels = encoded_images(section, recipe.teacher, settings), cached_pixels(section, settings)

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, rows: list[int]) -> tuple[np.ndarray, Tensor, list[str]]:
        captions = [self.latents.captions[row] for row in rows]
        return self.pixels.take(rows).numpy(), self.latents.take(rows).float(), captions


class ControlNetStage(Stage):
    """Captions are dropped often, so that the ControlNet learns to read the map itself."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.recipe, ControlNetRecipe)
        recipe, placement = context.recipe, context.placement
        section = recipe.controlnet
        torch.manual_seed(recipe.seed)  # of the layers that bring the condition down
        self.context, self.section, self.steps, self.deal = context, section, section.steps, Deal.of(section)
        self.conditions = recipe.conditions
        vae: AutoencoderKL = load_frozen(AutoencoderKL, context.teacher_folder / "vae")
        self.views = self._views(recipe, vae)
        unet: UNet2DConditionModel = load_frozen(UNet2DConditionModel, context.teacher_folder / "unet")
        self.student = Controlled(placement.place(unet), from_unet(unet, 2 ** (len(vae.config.block_out_channels) - 1)))
        self.trainables = {"unet": stage_trainable(self.student, section, placement)}
        self.diffusion = Diffusion.of(context.teacher_folder)
        self.predict = Predictor(self.trainables["unet"].module, context.text_encoder(), placement)

    @staticmethod
    def _views(recipe: ControlNetRecipe, vae: AutoencoderKL) -> Views:
        if recipe.world is None:
            return CapturedViews(recipe, Settings())
        return WorldViews(recipe.world, recipe.controlnet, vae, recipe.seed)

    def step(self, index: int) -> Losses:
        return self.trainables["unet"].learn(self.deal.turns(index), self._losses)

    def _losses(self, turn: Turn) -> Losses:
        generator, size = step_generator(self.context.recipe.seed, turn.index, turn.micro), self.deal.size
        image_BHWC, latent_BCHW, captions = self.views.take(
            torch.randint(len(self.views), (size,), generator=generator).tolist()
        )
        dropped = torch.rand(size, generator=generator) < self.section.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        control_BHWC = condition_maps(image_BHWC, self.conditions, generator)
        t_B = stratified_timesteps(size, 0, self.diffusion.timesteps, generator)
        noise_BCHW = torch.randn(latent_BCHW.shape, generator=generator)
        device = self.context.placement.device
        latent_BCHW, noise_BCHW, t_B = latent_BCHW.to(device), noise_BCHW.to(device), t_B.to(device)
        output_BCHW = self.predict(self.diffusion.diffuse(latent_BCHW, noise_BCHW, t_B), t_B, captions, control_BHWC)
        return {"loss": F.mse_loss(output_BCHW, self.diffusion.target(latent_BCHW, noise_BCHW, t_B))}

    def export(self, folder: Path) -> None:
        save_student(self.student, self.trainables["unet"].averaged(), folder)
