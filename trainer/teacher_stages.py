"""How a teacher recipe becomes its three stages. The composition root of teacher training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxs.settings import Settings
from sdxs.store.transfer import sha256_file
from trainer.data.latent_cache import EncodedImages, cached_latents, cached_pixels
from trainer.latents import LatentViews, encode_views
from trainer.loop import Stage
from trainer.models.judge import to_tensor
from trainer.models.tokenizer import train_tokenizer
from trainer.recipe import TeacherRecipe
from trainer.sections import ImagesSection
from trainer.sources import load_frozen
from trainer.stages.autoencoder import AutoencoderStage
from trainer.stages.denoiser import DenoiserStage
from trainer.stages.judge import JudgeStage
from trainer.worlds.base import World, get_world


def order(recipe: TeacherRecipe) -> list[str]:
    """The stages of a recipe."""
    return [*(["judge"] if recipe.judge else []), "autoencoder", "denoiser"]


def world_source(world: World) -> Callable[[int, torch.Generator], Tensor]:
    """Random training views of a world as a batch source for the autoencoder."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (1,), generator=generator))
        return to_tensor(world.training_images(count, np.random.default_rng(seed))[0])

    return draw


def image_source(images: EncodedImages) -> Callable[[int, torch.Generator], Tensor]:
    """Random images of a data set."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        image_BHWC, _ = images.draw(count, generator)
        return image_BHWC.permute(0, 3, 1, 2) / 127.5 - 1

    return draw


def build(recipe: TeacherRecipe, name: str, folder: Path) -> Stage:
    """Stage `name` of a teacher recipe; results of earlier stages are read from `folder`."""
    if recipe.images is not None:
        return _on_images(recipe, recipe.images, name, folder)
    assert recipe.world is not None
    world = get_world(recipe.world)
    if name == "judge":
        assert recipe.judge is not None
        return JudgeStage(world, recipe.judge.schedule(), recipe.judge.batch, recipe.seed)
    if name == "autoencoder":
        return AutoencoderStage(recipe.autoencoder, world_source(world), recipe.seed)
    return _denoiser(recipe, _views(recipe, world, folder), world.vocabulary(), folder)


def _on_images(recipe: TeacherRecipe, section: ImagesSection, name: str, folder: Path) -> Stage:
    """On captioned images, which are read once, and encoded once by the finished autoencoder."""
    if name == "autoencoder":
        return AutoencoderStage(recipe.autoencoder, image_source(cached_pixels(section, Settings())), recipe.seed)
    vae: AutoencoderKL = load_frozen(AutoencoderKL, folder / "vae")
    key = sha256_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    latents = cached_latents(section, lambda image_BHWC: vae.encode(to_tensor(image_BHWC)).latent_dist.mean, key, Settings())
    return _denoiser(recipe, latents, sorted(set(latents.captions)), folder)


def _views(recipe: TeacherRecipe, world: World, folder: Path) -> LatentViews:
    cached = folder / "views.pt"
    if cached.exists():
        return LatentViews(**torch.load(cached, weights_only=True))
    views = encode_views(load_frozen(AutoencoderKL, folder / "vae"), world, recipe.denoiser.views, recipe.seed)
    torch.save(vars(views), cached)
    return views


def _denoiser(
    recipe: TeacherRecipe, latents: LatentViews | EncodedImages, vocabulary: list[str], folder: Path
) -> DenoiserStage:
    section = recipe.denoiser
    tokenizer = train_tokenizer(vocabulary, folder / "tokenizer", section.vocabulary, section.max_tokens)
    return DenoiserStage(section, tokenizer, latents.draw, recipe.seed)
