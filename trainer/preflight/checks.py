"""What can be wrong with a recipe that shows before any worker starts: parts, shapes, files, and what the machines can do.

Every fault is one error that names the field, its value, what is allowed, and the recipe's file. No weights are read but a LoRA's names
and shapes, of others only what their files' headers say, and no GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from sdxs.errors import InvalidRequest, PreconditionFailed, SdxsError
from sdxs.settings import Settings
from trainer.cluster import Cluster
from trainer.models import lora
from trainer.models.features import check_encoder
from trainer.models.students import shrink
from trainer.plan import offline_spec
from trainer.preflight.control_checks import check_base, check_controlnet, share_noise
from trainer.preflight.given import (
    Recipe,
    absent,
    check_images,
    check_prompts,
    check_weights,
    images_field,
    images_of,
    missing_for_images,
    of_field,
    reworded,
    style_of,
)
from trainer.preflight.shapes import TeacherShapes, build, feature_maps, read_shapes, teacher_shapes
from trainer.recipe import ControlRecipe, DistillRecipe, StyleRecipe
from trainer.sections import DiffInstructSection, ImagesSection, LoraSection, MatchingSection, Optimisation, PairsSection
from trainer.sources import teacher_folder
from trainer.worlds.base import get_world


def check(recipe: Recipe, cluster: Cluster, settings: Settings, file: str, *, fetch: bool = True) -> TeacherShapes:
    """Everything about a recipe that needs no worker. Returns its teacher's shapes.

    Args:
        file: where the recipe was read from, for messages.
        fetch: download what is not on this machine yet. Without, such a teacher is judged by its published shapes, and files of the
            user's own may be missing (`absent`).

    Raises:
        SdxsError: the first fault; InvalidRequest or NotFound but for a store or a hub that does not answer or refuses.
    """
    with in_file(file):
        check_world(recipe.world)
        _machines(recipe, cluster)
        _packages(recipe)
        teacher = _teacher("teacher", recipe.teacher, fetch)
        missing = [] if fetch else [field for field, _ in absent(recipe)]
        if recipe.data is not None and "data.prompts" not in missing:
            check_prompts(recipe.data, settings, fetch)
        images = images_of(recipe)
        if images is not None:
            _image_size(images, images_field(recipe), teacher)
            if f"{images_field(recipe)}.images" not in missing:
                check_images(images, images_field(recipe))
        if isinstance(recipe, (StyleRecipe, ControlRecipe)) and "base" not in missing:
            check_base(recipe, teacher, settings, fetch)
        if isinstance(recipe, (DistillRecipe, ControlRecipe)):
            student = _student(recipe, teacher)
            if isinstance(recipe, DistillRecipe):
                _decoder(recipe, teacher)
            else:
                check_controlnet(recipe, teacher, student, fetch)
        elif "world" not in missing and (lacking := missing_for_images(recipe)):
            raise PreconditionFailed(f"world {recipe.world!r}: its images need {lacking}, which this machine does not have")
        for name, section in matching_sections(recipe):
            _feature_weights(name, section, teacher, fetch)
        _other_teachers(recipe, teacher, fetch)
        _loras(recipe, teacher, fetch, missing)
    return teacher


@contextmanager
def in_file(file: str) -> Iterator[None]:
    """Says of every fault found inside which recipe it is in."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(error.field, error.value, f"{error.allowed} (recipe {file})") from error
    except SdxsError as error:
        raise reworded(error, f"{error} (recipe {file})", error.field) from error


def check_world(name: str | None) -> None:
    """A world that a recipe names is one. Raises InvalidRequest."""
    if name is not None:
        get_world(name)


def _image_size(section: ImagesSection, field: str, teacher: TeacherShapes) -> None:
    """The U-Net's stages can halve the latents of images of that size."""
    step = teacher.factor * 2 ** (len(teacher.unet["block_out_channels"]) - 1)
    if section.size % step:
        raise InvalidRequest(f"{field}.size", section.size, f"a multiple of {step} pixels")


def trained_sections(recipe: Recipe) -> list[tuple[str, Optimisation]]:
    """The sections of all stages that train, by name."""
    fields = type(recipe).model_fields
    return [(name, getattr(recipe, name)) for name in fields if isinstance(getattr(recipe, name), Optimisation)]


def matching_sections(recipe: Recipe) -> list[tuple[str, MatchingSection]]:
    """Those of them that match features."""
    return [(name, section) for name, section in trained_sections(recipe) if isinstance(section, MatchingSection)]


def _machines(recipe: Recipe, cluster: Cluster) -> None:
    """Precision for the devices, batches for the number of workers."""
    compute = recipe.compute
    if compute.precision == "bf16" and not cluster.gpus_per_worker:
        raise InvalidRequest("compute.precision", "bf16", "float32 on workers without a GPU, or --gpus-per-worker")
    asked = cluster.gpus_per_teacher if cluster.teachers else cluster.gpus_per_worker
    if compute.teacher_precision == "fp16" and not asked:
        raise InvalidRequest("compute.teacher_precision", "fp16", "float32 for a teacher without a GPU, or --gpus-per-teacher")
    elastic = not isinstance(cluster.workers, int) and len(set(cluster.workers)) > 1
    for name, section in trained_sections(recipe):
        if section.micro_batch is None and elastic:
            raise InvalidRequest(
                f"{name}.micro_batch", None, "a number, with elastic workers: batches must not depend on how many"
            )
        if section.micro_batch is None and section.batch % cluster.most_workers:
            raise InvalidRequest(
                f"{name}.batch", section.batch, f"a multiple of {cluster.most_workers} workers, or a micro_batch"
            )


def _packages(recipe: Recipe) -> None:
    """Libraries that only some recipes need."""
    for name, section in trained_sections(recipe):
        eight = isinstance(section, DiffInstructSection) and section.online_optimizer == "adamw8bit"
        if eight and find_spec("torchao") is None:
            raise InvalidRequest(f"{name}.online_optimizer", "adamw8bit", "adamw, or an installed torchao")


def _teacher(field: str, source: str, fetch: bool) -> TeacherShapes:
    """A teacher with all its parts; where it is to be fetched only later, its shapes."""
    with of_field(field, source):
        shapes = read_shapes(source, teacher_folder(source)) if fetch else teacher_shapes(source)
    if shapes.folder is not None:
        _whole(field, shapes, shapes.folder)
    return shapes


def _whole(field: str, shapes: TeacherShapes, folder: Path) -> None:
    """Networks with weights; for SDXL two text encoders."""
    second = ("text_encoder_2", "tokenizer_2") if shapes.sdxl else ()
    for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer", *second):
        if not (folder / part).is_dir():
            raise InvalidRequest(field, shapes.source, f"a diffusers text-to-image folder; {folder} has no {part}/")
    for part in ("unet", "vae", "text_encoder", *second[:1]):
        if not any((folder / part).glob("*.safetensors")) and not any((folder / part).glob("*.bin")):
            raise InvalidRequest(field, shapes.source, f"a folder with weights; {folder / part} has no .safetensors")
        check_weights(field, shapes.source, folder / part)
    kind = shapes.scheduler.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise InvalidRequest(f"{field}.scheduler.prediction_type", kind, "epsilon or v_prediction")


def _student(recipe: DistillRecipe | ControlRecipe, teacher: TeacherShapes) -> UNet2DConditionModel:
    """Block removal works on this teacher: every layer that stays has the same shape. Returns the student, without weights."""
    with torch.device("meta"):
        unet = build(UNet2DConditionModel, teacher.unet, "teacher.unet")
        try:
            return shrink(unet, recipe.student.blocks)
        except (ValueError, KeyError, IndexError) as error:
            allowed = f"blocks that fit the teacher {teacher.source!r} ({error})"
            raise InvalidRequest("student.blocks", recipe.student.blocks, allowed) from error


def _decoder(recipe: DistillRecipe, teacher: TeacherShapes) -> None:
    """A tiny autoencoder of the teacher's latents and image size."""
    config, field = recipe.decoder.config, "decoder.config"
    missing = [name for name in ("latent_channels", "decoder_block_out_channels") if name not in config]
    if missing:
        raise InvalidRequest(f"{field}.{missing[0]}", None, "a configuration of AutoencoderTiny with this field")
    for side in ("decoder", "encoder"):
        _levels(config, side, teacher)
    with torch.device("meta"):
        try:
            AutoencoderTiny(**config)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InvalidRequest(field, config, f"a configuration of diffusers' AutoencoderTiny ({error})") from error
    channels = teacher.latent[0]
    if config["latent_channels"] != channels:
        raise InvalidRequest(
            f"{field}.latent_channels", config["latent_channels"], f"{channels}, as the teacher's latents have"
        )


def _levels(config: dict[str, Any], side: str, teacher: TeacherShapes) -> None:
    """As many resolutions as the teacher's autoencoder has, each with its number of blocks."""
    widths = config.get(f"{side}_block_out_channels", (64,) * 4)
    blocks = config.get(f"num_{side}_blocks", (3,) * 4)
    levels = teacher.factor.bit_length()
    if len(widths) != levels:
        allowed = f"{levels} widths: an image is {teacher.factor} times the size of the teacher's latent"
        raise InvalidRequest(f"decoder.config.{side}_block_out_channels", widths, allowed)
    if len(blocks) != levels:
        raise InvalidRequest(f"decoder.config.num_{side}_blocks", blocks, f"{levels} numbers, one for each width")


def _feature_weights(name: str, section: MatchingSection, teacher: TeacherShapes, fetch: bool) -> None:
    """An encoder that is what it is called, and one weight for each of its maps."""
    source = section.encoder_source or ""
    if fetch or Path(source).exists():
        try:
            check_encoder(section.encoder, section.encoder_source)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name}.encoder_source", source, error.allowed) from error
    maps = feature_maps(section, teacher)
    if len(section.feature_weights) != maps:
        allowed = f"{maps} numbers, one for each map of {section.encoder}"
        raise InvalidRequest(f"{name}.feature_weights", section.feature_weights, allowed)


def _other_teachers(recipe: Recipe, teacher: TeacherShapes, fetch: bool) -> None:
    """Models beside the teacher: who draws samples shares its latents, who gives the offline score also its text and its noise."""
    for name, section in drawn_sections(recipe):
        if section.teacher is not None:
            _share_latents(f"{name}.teacher", _teacher(f"{name}.teacher", section.teacher, fetch), teacher)
    offline = recipe.offline if isinstance(recipe, DistillRecipe) else None
    if offline is not None and offline.teacher is not None:
        other = _teacher("offline.teacher", offline.teacher, fetch)
        _share_latents("offline.teacher", other, teacher)
        _share_text("offline.teacher", other, teacher)
        share_noise("offline.teacher", other.source, other.scheduler, teacher)


def drawn_sections(recipe: Recipe) -> list[tuple[str, PairsSection]]:
    """Everything that is sampled from a teacher, by its field."""
    found = [(name, getattr(recipe, name, None)) for name in ("pairs", "compositions", "controlled")]
    straighten = recipe.straighten if isinstance(recipe, DistillRecipe) else None
    named = [*found, ("straighten.samples", straighten.samples if straighten else None)]
    return [(name, section) for name, section in named if section is not None]


def _share_latents(field: str, other: TeacherShapes, teacher: TeacherShapes) -> None:
    if other.latent != teacher.latent:
        raise InvalidRequest(field, other.source, f"latents of {teacher.latent}, as the teacher's; these are {other.latent}")
    theirs, ours = (shapes.vae.get("scaling_factor", 0.18215) for shapes in (other, teacher))
    if theirs != ours:
        raise InvalidRequest(field, other.source, f"latents scaled by {ours}, as the teacher's; these are by {theirs}")


def _share_text(field: str, other: TeacherShapes, teacher: TeacherShapes) -> None:
    for name, theirs, ours in (
        ("cross_attention_dim", other.text_width, teacher.text_width),
        ("SDXL", other.sdxl, teacher.sdxl),
    ):
        if theirs != ours:
            raise InvalidRequest(field, other.source, f"the teacher's text: {name} {ours}; this one has {theirs}")


def _loras(recipe: Recipe, teacher: TeacherShapes, fetch: bool, missing: list[str]) -> None:
    """Style LoRAs fit the model they are merged into."""
    style = style_of(recipe)
    if style is None or style[0] in missing:
        return
    assert isinstance(recipe, (DistillRecipe, StyleRecipe))
    source = offline_spec(recipe).source
    _lora(*style, teacher if source == recipe.teacher else _teacher("offline", source, fetch))


def _lora(field: str, section: LoraSection, teacher: TeacherShapes) -> None:
    try:
        lora.check_lora(section.path, teacher.unet)
    except InvalidRequest as error:
        raise InvalidRequest(field, section.path, f"{error.allowed} ({Path(section.path).name})") from error
