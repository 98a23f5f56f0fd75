"""A recipe made small: the same stages, options and classes of networks, random weights of tiny widths, two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderTiny, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from sdxs import bundle
from trainer.models import lora
from trainer.models.controlnets import from_unet
from trainer.models.families import write_teacher
from trainer.models.features import VGGEncoder
from trainer.models.folders import conditioning_folders, write_model_index, write_one_step_scheduler
from trainer.models.students import Blocks, shrink
from trainer.preflight.checks import drawn_sections, trained_sections
from trainer.preflight.control_checks import NOISE
from trainer.preflight.given import Recipe
from trainer.preflight.shapes import TeacherShapes, family_of, feature_maps, read_shapes, teacher_shapes
from trainer.recipe import ControlNetRecipe, ControlRecipe, DistillRecipe, StyleRecipe, parse
from trainer.sections import MatchingSection
from trainer.sources import ASSETS, load_frozen
from trainer.worlds.base import get_world

STEPS, BATCH, COUNT = 2, 4, 8
WORLD = "scenes"  # whose captions stand for the prompts


def small_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with everything that it names made small under `folder`."""
    data = recipe.model_dump()
    teacher = small_teacher(recipe.teacher, folder / "teacher", seed=0)
    shapes = read_shapes(str(teacher), teacher)
    data |= {"teacher": str(teacher), "world": WORLD, "data": None}
    data["compute"] |= {"precision": "float32", "teacher_precision": "float32"}
    for name, section in trained_sections(recipe):
        data[name] |= _small_section(section.model_dump())
        if isinstance(section, MatchingSection):
            data[name] |= _small_encoder(section, shapes, folder)
    for name, _ in drawn_sections(recipe):
        *path, last = name.split(".")
        holder = data[path[0]] if path else data
        holder[last] |= {"count": COUNT, "steps": STEPS, "teacher": _small_other(holder[last]["teacher"], folder)}
    if isinstance(recipe, ControlNetRecipe) and recipe.controlnet.images is not None:
        data["world"], data["controlnet"]["images"] = None, _small_images(folder / "images", shapes)
    if isinstance(recipe, ControlRecipe):
        data["base"] = str(small_bundle(teacher, folder / "base", recipe.student.blocks))
        data["controlnet"] = str(_small_controlnet(teacher, folder / "controlnet"))
    if isinstance(recipe, StyleRecipe):
        data["base"] = str(small_bundle(teacher, folder / "base"))
        data["style"]["path"] = str(_small_lora(teacher, folder / "style"))
    if isinstance(recipe, DistillRecipe):
        data["decoder"]["config"] = _small_decoder(recipe.decoder.config, shapes)
        data["offline"] = _small_offline(data["offline"], teacher, folder)
    made = parse(data)
    assert isinstance(made, type(recipe))
    return made


def small_teacher(source: str, folder: Path, seed: int) -> Path:
    """A random one of the same family, prediction and number of latent channels; an embedded teacher is small already."""
    embedded = ASSETS / source.removesuffix("-teacher") / "teacher"
    if source.endswith("-teacher") and embedded.is_dir():
        return embedded
    shapes = teacher_shapes(source)
    write_teacher(family_of(shapes), folder, seed=seed, latent_channels=shapes.latent[0])
    path = folder / "scheduler" / "scheduler_config.json"
    noise = {name: shapes.scheduler[name] for name in NOISE if name in shapes.scheduler}
    path.write_text(json.dumps(json.loads(path.read_text()) | noise))
    return folder


def _small_other(source: str | None, folder: Path) -> str | None:
    """Another teacher that is named beside the first."""
    if source is None:
        return None
    target = folder / "others" / source.strip("/").replace("/", "-")
    return str(target if target.is_dir() else small_teacher(source, target, seed=1))


def _small_offline(offline: dict[str, Any] | None, teacher: Path, folder: Path) -> dict[str, Any] | None:
    if offline is None:
        return None
    other = _small_other(offline["teacher"], folder)
    style = offline["lora"]
    if style is not None:
        style = style | {"path": str(_small_lora(Path(other) if other else teacher, folder / "style"))}
    return {"teacher": other, "lora": style}


def _small_encoder(section: MatchingSection, shapes: TeacherShapes, folder: Path) -> dict[str, Any]:
    """An image network of random weights, and a weight for each map."""
    target = folder / section.encoder
    if section.encoder == "vgg" and not target.exists():
        target.mkdir()
        state = VGGEncoder(lambda latent_BCHW: latent_BCHW).features.state_dict()
        save_file({f"features.{name}": value for name, value in state.items()}, target / "model.safetensors")
    if section.encoder == "dinov2" and not target.exists():
        config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56)
        transformers.Dinov2Model(config).save_pretrained(target)
    source = None if section.encoder == "unet" else str(target)
    given = section.feature_weights
    maps = feature_maps(section.model_copy(update={"encoder_source": source}), shapes)
    return {"encoder_source": source, "feature_weights": (*given, *(given[-1:] * maps))[:maps]}


def _small_section(section: dict[str, Any]) -> dict[str, Any]:
    """Two steps of a stage with all that its options ask for, on samples of the teacher where the recipe has images of its own."""
    several = section["micro_batch"] is not None and section["micro_batch"] < section["batch"]
    changes: dict[str, Any] = {
        "steps": STEPS, "batch": BATCH, "micro_batch": BATCH // 2 if several else None, "warmup": 0, "restarts": None,
        "gan_start": 0, "online_optimizer": "adamw", "images": None,
        "discriminator_width": 8,
    }  # fmt: skip
    ranks = {name: min(4, section[name]) for name in ("lora_rank", "online_lora_rank", "rank") if section.get(name)}
    return {name: value for name, value in changes.items() if name in section} | ranks


def _small_decoder(config: dict[str, Any], shapes: TeacherShapes) -> dict[str, Any]:
    levels = shapes.factor.bit_length()
    few, one = (8,) * levels, (1,) * levels
    return config | {
        "latent_channels": shapes.latent[0], "encoder_block_out_channels": few, "decoder_block_out_channels": few,
        "num_encoder_blocks": one, "num_decoder_blocks": one,
    }  # fmt: skip


def _small_lora(teacher: Path, folder: Path) -> Path:
    """A style LoRA of random weights for a teacher."""
    unet = load_frozen(UNet2DConditionModel, teacher / "unet")
    lora.attach(unet, 2)
    weights = {name: 0.01 * torch.randn_like(value) if ".lora_" in name else value for name, value in unet.state_dict().items()}
    lora.save_adapter(weights, folder, 2)
    return folder


def _small_controlnet(teacher: Path, folder: Path) -> Path:
    """A ControlNet of a teacher that adds something: its zero convolutions are not."""
    shapes = read_shapes(str(teacher), teacher)
    network = from_unet(load_frozen(UNet2DConditionModel, teacher / "unet"), shapes.factor)
    for name, weight in network.named_parameters():
        if name.startswith("controlnet_") and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    network.save_pretrained(folder)
    return folder


def _small_images(folder: Path, shapes: TeacherShapes) -> dict[str, Any]:
    """A few captioned images of the teacher's size."""
    side = shapes.latent[1] * shapes.factor
    images, captions = get_world(WORLD).training_images(BATCH, np.random.default_rng(0))
    folder.mkdir()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        Image.fromarray(image).resize((side, side)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return {"images": str(folder), "size": side}


def small_bundle(teacher: Path, folder: Path, blocks: Blocks | None = None) -> Path:
    """A one-step bundle of the teacher's own shrunk U-Net, as a distillation would leave it."""
    shapes = read_shapes(str(teacher), teacher)
    shrink(load_frozen(UNet2DConditionModel, teacher / "unet"), blocks).save_pretrained(folder / "unet")
    AutoencoderTiny(**_small_decoder({}, shapes)).save_pretrained(folder / "vae")
    for name in conditioning_folders(teacher):
        (folder / name).symlink_to(teacher / name)
    write_one_step_scheduler(teacher, folder)
    write_model_index(folder)
    bundle.seal(folder, "base")
    return folder
