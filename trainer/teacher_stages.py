"""How a teacher recipe becomes its three stages. The composition root of teacher training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trainer.judge import to_tensor
from trainer.latents import LatentViews, encode_views
from trainer.loop import Stage
from trainer.recipe import TeacherRecipe
from trainer.stages.autoencoder import AutoencoderStage
from trainer.stages.denoiser import DenoiserStage
from trainer.stages.judge import JudgeStage
from trainer.teacher import load_frozen
from trainer.tokenizer import train_tokenizer
from trainer.worlds.base import World, get_world

ORDER = ("judge", "autoencoder", "denoiser")


def image_source(world: World) -> Callable[[int, torch.Generator], Tensor]:
    """Random training views as a batch source for the autoencoder."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (1,), generator=generator))
        return to_tensor(world.training_images(count, np.random.default_rng(seed))[0])

    return draw


def build(recipe: TeacherRecipe, name: str, folder: Path) -> Stage:
    """Stage `name` of a teacher recipe; results of earlier stages are read from `folder`."""
    world = get_world(recipe.world)
    if name == "judge":
        return JudgeStage(world, recipe.judge.schedule(), recipe.judge.batch, recipe.seed)
    if name == "autoencoder":
        return AutoencoderStage(recipe.autoencoder, image_source(world), recipe.seed)
    return _denoiser(recipe, world, folder)


def _denoiser(recipe: TeacherRecipe, world: World, folder: Path) -> DenoiserStage:
    section = recipe.denoiser
    cached = folder / "views.pt"
    if cached.exists():
        views = LatentViews(**torch.load(cached, weights_only=True))
    else:
        views = encode_views(load_frozen(AutoencoderKL, folder / "vae"), world, section.views, recipe.seed)
        torch.save(vars(views), cached)
    tokenizer = train_tokenizer(world.vocabulary(), folder / "tokenizer", section.vocabulary, section.max_tokens)
    return DenoiserStage(section, tokenizer, views.draw, recipe.seed)
