"""What can be wrong with a finished bundle that a recipe goes on from, and with the ControlNet that it distils."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxs import registry
from sdxs.bundle import control_types, read_config
from sdxs.errors import InvalidRequest, NotFound
from sdxs.settings import Settings
from trainer.models.controlnets import KINDS, MID, built, shrink_controlnet
from trainer.models.students import student_config
from trainer.preflight.given import check_weights, local_base, of_field
from trainer.preflight.shapes import ControlNetShapes, TeacherShapes, controlnet_shapes
from trainer.recipe import ControlRecipe, StyleRecipe
from trainer.sections import FeatureSection
from trainer.sources import controlnet_folder

NOISE = {
    "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
}  # fmt: skip
"""What two models' noise schedules must share, with diffusers' defaults."""
STAGES = ("block_out_channels", "down_block_types", "layers_per_block", "mid_block_type")
"""What the residuals of a ControlNet depend on."""
BLOCKS = ("down_block_types", "up_block_types", "mid_block_type", "layers_per_block", "transformer_layers_per_block")
"""What a student has less of than its teacher."""


def share_noise(field: str, source: str, scheduler: Mapping[str, Any], teacher: TeacherShapes) -> None:
    """Raises InvalidRequest where a model was trained on other noise than the teacher."""
    for name, default in NOISE.items():
        theirs, ours = scheduler.get(name, default), teacher.scheduler.get(name, default)
        if theirs != ours:
            raise InvalidRequest(field, source, f"the teacher's {name}, {ours}; this one has {theirs}")


def check_base(recipe: StyleRecipe | ControlRecipe, teacher: TeacherShapes, settings: Settings, fetch: bool) -> None:
    """The bundle that learns a style or a condition is a student of this teacher's kind.

    Raises:
        InvalidRequest, NotFound, CorruptArtifact.
    """
    with of_field("base", recipe.base):
        here = None if fetch else local_base(recipe.base)
        folder, _ = registry.open_model(here or recipe.base, settings)
        unet, scheduler = read_config(folder, "unet/config.json"), read_config(folder, "scheduler/scheduler_config.json")
    for part in ("unet", "vae", "text_encoder"):
        check_weights("base", recipe.base, folder / part)
    if all(unet.get(name) == teacher.unet.get(name) for name in BLOCKS):
        raise InvalidRequest("base", recipe.base, "a one-step bundle: a student, which has fewer blocks than its teacher")
    for name in ("in_channels", "sample_size", "cross_attention_dim"):
        _same("base", recipe.base, name, unet.get(name), teacher.unet[name])
    share_noise("base", recipe.base, scheduler, teacher)
    if isinstance(recipe, ControlRecipe):
        shrunk = student_config(teacher.unet, recipe.student.blocks)
        for name in STAGES:
            _same("base", recipe.base, name, unet.get(name, MID), shrunk.get(name, MID))
        _base_decoder(recipe, folder)


def _base_decoder(recipe: ControlRecipe, folder: Path) -> None:
    """Encoders that look at images look through the base's own small decoder."""
    kind = read_config(folder, "vae/config.json").get("_class_name")
    for name in ("warmup", "diff_instruct"):
        section: FeatureSection | None = getattr(recipe, name)
        if section is not None and section.encoder != "unet" and kind != "AutoencoderTiny":
            raise InvalidRequest(
                f"{name}.encoder", section.encoder, f"unet: {recipe.base} has no AutoencoderTiny to look through"
            )


def check_controlnet(recipe: ControlRecipe, teacher: TeacherShapes, student: UNet2DConditionModel, fetch: bool) -> None:
    """The ControlNet is of this teacher, has weights, knows the conditions, and the student's can be cut from it.

    Args:
        student: without weights.

    Raises:
        InvalidRequest, NotFound.
    """
    shapes, source = _shapes(recipe.controlnet, teacher, fetch), recipe.controlnet
    kind = shapes.config.get("_class_name", "ControlNetModel")
    if kind not in KINDS:
        raise InvalidRequest("controlnet", source, f"one of the classes {', '.join(KINDS)}; this is {kind!r}")
    with torch.device("meta"):
        big = built(shapes.config, "controlnet")
        unet = UNet2DConditionModel.from_config(dict(teacher.unet))
        for name in ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type"):
            _same("controlnet", source, name, big.config[name], unet.config[name])
        _pixels(source, shapes, teacher)
        try:
            shrink_controlnet(big, student)
        except InvalidRequest as error:
            raise InvalidRequest("controlnet", source, f"a ControlNet made from the teacher's U-Net ({error})") from error
    if shapes.folder is not None:
        _files(recipe, shapes.folder)


def _shapes(source: str, teacher: TeacherShapes, fetch: bool) -> ControlNetShapes:
    try:
        return controlnet_shapes(source, teacher, controlnet_folder(source) if fetch else None)
    except NotFound as error:
        raise NotFound(f"controlnet: {error}") from error


def _pixels(source: str, shapes: ControlNetShapes, teacher: TeacherShapes) -> None:
    """It reads RGB maps of the size of the teacher's images."""
    channels = shapes.config.get("conditioning_channels", 3)
    if channels != 3:
        raise InvalidRequest("controlnet", source, f"3 conditioning_channels, for RGB maps; this one has {channels}")
    if shapes.factor != teacher.factor:
        allowed = (
            f"conditioning_embedding_out_channels that bring a map down by {teacher.factor}, as the teacher's autoencoder does"
        )
        raise InvalidRequest("controlnet", source, f"{allowed}; these do by {shapes.factor}")


def _files(recipe: ControlRecipe, folder: Path) -> None:
    """Weights in safetensors; and where it says which conditions it learnt, these are among them."""
    if not any(folder.glob("*.safetensors")):
        raise InvalidRequest("controlnet", recipe.controlnet, f"a folder with weights; {folder} has no .safetensors")
    known = control_types(folder)
    unknown = [name for name in recipe.conditions if name not in known]
    if known and unknown:
        allowed = f"those that the teacher's ControlNet learnt: {', '.join(known)}"
        raise InvalidRequest("conditions", unknown[0], allowed)


def _same(field: str, source: str, name: str, theirs: Any, ours: Any) -> None:
    theirs, ours = (tuple(value) if isinstance(value, (list, tuple)) else value for value in (theirs, ours))
    if theirs != ours:
        raise InvalidRequest(field, source, f"the teacher's {name}, {ours}; this one has {theirs}")
