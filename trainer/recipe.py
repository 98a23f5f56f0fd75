"""Recipes: what science a run does, in one complete frozen file. Where things are is settings; how many machines is the launcher's.

A recipe is TOML; unknown keys are errors; its digest is written into what it produced.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, model_validator

from sdxs.errors import InvalidRequest
from trainer import documents
from trainer.sections import (
    AutoencoderSection,
    ComputeSection,
    ControlledSection,
    ControlNetSection,
    ControlShrinkSection,
    DataSection,
    DecoderSection,
    DenoiserSection,
    DiffInstructSection,
    EvaluationSection,
    FinishSection,
    ImagesSection,
    LoraSection,
    OfflineSection,
    Optimisation,
    PairsSection,
    SampleImagesSection,
    Section,
    ShrinkSection,
    StraightenSection,
    StudentSection,
    StyleSection,
    WarmupSection,
)  # fmt: skip


class TeacherRecipe(Section):
    """Trains a small multi-step teacher, on a world, whose judge it trains too, or on captioned images of one's own."""

    kind: Literal["teacher"]
    name: str
    world: str | None = None
    images: ImagesSection | None = None
    seed: int = 0
    judge: Optimisation | None = None
    autoencoder: AutoencoderSection
    denoiser: DenoiserSection

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if (self.world is None) == (self.images is None):
            raise ValueError("world or images: a teacher learns from one of the two")
        if (self.world is None) != (self.judge is None):
            raise ValueError("judge: a world has one, images have none")
        return self


class DistillRecipe(Section):
    """Turns a teacher into a one-step bundle: pairs, then the stages that are there, in the order of the fields.

    Prompts are those of a `world`, which also has a judge, or of `data`: one of the two.
    """

    kind: Literal["distill"]
    name: str
    world: str | None = None
    data: DataSection | None = None
    teacher: str
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    student: StudentSection = StudentSection()
    offline: OfflineSection | None = None
    straighten: StraightenSection | None = None
    pairs: PairsSection
    compositions: PairsSection | None = None  # samples of recombined captions too, for the U-Net
    decoder: DecoderSection
    unet: ShrinkSection
    warmup: WarmupSection | None = None
    diff_instruct: DiffInstructSection | None = None
    finish: FinishSection | None = None
    evaluation: EvaluationSection

    @model_validator(mode="after")
    def _prompts(self) -> Self:
        if (self.world is None) == (self.data is None):
            raise ValueError("world or data: the prompts come from one of the two")
        return self

    @model_validator(mode="after")
    def _one_drawer(self) -> Self:
        for name in ("pairs", "compositions"):
            section = getattr(self, name)
            if self.straighten is not None and section is not None and section.teacher is not None:
                raise ValueError(f"{name}.teacher: with [straighten] the straightened teacher draws; remove one of the two")
        return self


class StyleRecipe(Section):
    """Teaches a finished one-step bundle (`base`) the style of a LoRA made for its teacher; the result is a LoRA for the bundle's U-Net."""

    kind: Literal["style"]
    name: str
    world: str | None = None
    data: DataSection | None = None
    base: str
    teacher: str
    style: LoraSection
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    pairs: PairsSection | None = None  # without: prompts and noise alone, which needs lambda_fm = [0, 0]
    lora: StyleSection
    evaluation: EvaluationSection

    @model_validator(mode="after")
    def _prompts(self) -> Self:
        if (self.world is None) == (self.data is None):
            raise ValueError("world or data: the prompts come from one of the two")
        if self.pairs is None and (
            max(self.lora.lambda_fm) > 0 or self.lora.latent_gan or self.lora.student_input == "diffused"
        ):
            raise ValueError("pairs: feature matching, a latent GAN and diffused input need samples of the teacher")
        return self


Condition = Literal["edge", "sketch", "colour"]


def _once(conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
    if len(set(conditions)) < len(conditions):
        raise ValueError(f"conditions {list(conditions)}: each stands once, all are drawn equally often")
    return conditions


Conditions = Annotated[tuple[Condition, ...], Field(min_length=1), AfterValidator(_once)]


class ControlNetRecipe(Section):
    """Trains a ControlNet for a multi-step teacher, on a world's images or on captioned images of one's own. One network learns all the
    `conditions`: it tells them apart by their looks."""

    kind: Literal["controlnet"]
    name: str
    world: str | None = None
    data: None = None
    teacher: str
    conditions: Conditions
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    controlnet: ControlNetSection

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if (self.world is None) == (self.controlnet.images is None):
            raise ValueError("world or controlnet.images: a ControlNet learns from one of the two")
        return self


class ControlRecipe(Section):
    """Distils a teacher's ControlNet (`controlnet`) into one for a one-step bundle (`base`), which then carries it as `control_name`.

    `unet` is the shrunk student as it was before it learnt one step: on it the small ControlNet first learns at every timestep. Where a
    caption has many images, maps of the plain samples teach it to look at them; where it has one, `controlled` samples are needed.
    """

    kind: Literal["control"]
    name: str
    world: str | None = None
    data: DataSection | None = None
    base: str
    teacher: str
    controlnet: str
    conditions: Conditions
    control_name: str = Field(default="union", pattern="^[a-z0-9][a-z0-9._-]{0,63}$")
    seed: int = 0
    compute: ComputeSection = ComputeSection()
    student: StudentSection = StudentSection()
    pairs: PairsSection
    compositions: PairsSection | None = None
    images: SampleImagesSection = SampleImagesSection()
    controlled: ControlledSection | None = None
    unet: ShrinkSection
    shrink: ControlShrinkSection
    warmup: WarmupSection | None = None
    diff_instruct: DiffInstructSection | None = None
    evaluation: EvaluationSection

    @model_validator(mode="after")
    def _prompts(self) -> Self:
        if (self.world is None) == (self.data is None):
            raise ValueError("world or data: the prompts come from one of the two")
        return self


AnyRecipe = TeacherRecipe | DistillRecipe | StyleRecipe | ControlNetRecipe | ControlRecipe
RunRecipe = DistillRecipe | StyleRecipe | ControlNetRecipe | ControlRecipe
"""Those that run on Ray."""
_ADAPTER: TypeAdapter[AnyRecipe] = TypeAdapter(Annotated[AnyRecipe, Field(discriminator="kind")])


def digest(value: BaseModel | Any) -> str:
    """sha256 of the canonical JSON of a recipe, a section of one, or plain data; first 16 hex digits.

    Of a recipe only what differs from the defaults counts: a field added later leaves earlier results valid.
    """
    data = value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def built_in() -> list[str]:
    """Names of the recipes that ship with the trainer."""
    return documents.shipped("trainer.recipes")


def load(name_or_path: str) -> AnyRecipe:
    """Read a recipe by built-in name or file path.

    Raises:
        NotFound: neither a built-in name nor a file.
        InvalidRequest: the file is not TOML or a field is missing, unknown or out of range; names the field and the file.
    """
    path, data = documents.read("recipe", name_or_path, "trainer.recipes")
    try:
        return parse(data)
    except InvalidRequest as error:
        raise InvalidRequest(error.field, error.value, f"{error.allowed} (recipe {path})") from error


def of_bundle(folder: Path) -> DistillRecipe | StyleRecipe:
    """The recipe that a bundle carries.

    Raises:
        InvalidRequest: it carries none, or one that this version cannot read; names the field.
    """
    path = folder / "recipe.json"
    found = parse(json.loads(path.read_text(encoding="utf8"))) if path.is_file() else None
    if not isinstance(found, (DistillRecipe, StyleRecipe)):
        raise InvalidRequest("model", str(folder), "a bundle that carries the recipe it was distilled by, recipe.json")
    return found


def of_controlnet(folder: Path) -> ControlRecipe:
    """The recipe that a ControlNet in a bundle carries.

    Raises:
        InvalidRequest: it carries none, or one that this version cannot read; names the field.
    """
    path = folder / "recipe.json"
    found = parse(json.loads(path.read_text(encoding="utf8"))) if path.is_file() else None
    if not isinstance(found, ControlRecipe):
        raise InvalidRequest("controlnet", folder.name, "a ControlNet that carries the recipe it was distilled by, recipe.json")
    return found


def parse(data: dict[str, Any]) -> AnyRecipe:
    """Raises InvalidRequest with the name of the first field that is missing, unknown or out of range."""
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        raise documents.refused("recipe", data, error, skip=1) from error  # the first part of a place is the kind itself
