"""Recipes: what science a run does, in one complete frozen file. Where things are is settings; how many machines is the launcher's.

A recipe is TOML; unknown keys are errors; its digest is written into what it produced. Fields without a number in the paper are
marked [chosen] in `docs/training.md`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from sdxs.errors import InvalidRequest, NotFound
from trainer.loop import Schedule


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimisation(Section):
    """Steps, batch and learning rate of one network."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    lr: float = Field(gt=0)
    warmup: int = Field(default=0, ge=0)
    cosine: bool = False
    restarts: list[int] | None = None
    ema: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup}: the rate never gets there in {self.steps} steps")
        bounds = [self.warmup, *(self.restarts or []), self.steps]
        if self.restarts and not (self.cosine and all(a < b for a, b in itertools.pairwise(bounds))):
            raise ValueError(f"restarts {self.restarts}: they need cosine = true, and ascending steps between warmup and steps")
        return self

    def schedule(self) -> Schedule:
        """The learning-rate schedule these numbers describe."""
        return Schedule(self.steps, self.lr, self.warmup, self.cosine, restarts=tuple(self.restarts or ()))


class AutoencoderSection(Optimisation):
    config: dict[str, Any]
    kl: float = Field(default=1e-3, ge=0)
    layout: float = Field(default=1.0, ge=0)
    colour: float = Field(default=0.5, ge=0)


class DenoiserSection(Optimisation):
    unet: dict[str, Any]
    text: dict[str, Any]
    scheduler: dict[str, Any]
    vocabulary: int = Field(gt=0)
    max_tokens: int = Field(gt=2)
    views: int = Field(gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)


class TeacherRecipe(Section):
    """Trains a small multi-step teacher and the judge of its world."""

    kind: Literal["teacher"]
    name: str
    world: str
    seed: int = 0
    judge: Optimisation
    autoencoder: AutoencoderSection
    denoiser: DenoiserSection


class PairsSection(Section):
    """Teacher samples: count, solver steps and guidance of psi(x_phi(eps))."""

    count: int = Field(gt=0)
    steps: int = Field(default=25, gt=0)
    guidance: float = Field(default=3.0, ge=1)
    solver: Literal["ddim", "dpm"] = "ddim"


class DecoderSection(Optimisation):
    """Eq. 5. `pixel_weight` adds a full-resolution L1, `encoder_weight` trains the tiny encoder that image-to-image needs."""

    config: dict[str, Any]
    gan_weight: float = Field(default=0.1, ge=0)
    gan_start: int = Field(default=0, ge=0)
    pixel_weight: float = Field(default=0.0, ge=0)
    encoder_weight: float = Field(default=0.0, ge=0)
    discriminator_lr: float = Field(default=3e-4, gt=0)
    discriminator_width: int = Field(default=32, gt=0)


class ShrinkSection(Optimisation):
    """Eqs. 6-8."""

    feature_weight: float = Field(default=1.0, ge=0)


class WarmupSection(Optimisation):
    """Eq. 10. `feature_weights` are w_l: the latent itself, then each down block of the teacher's U-Net."""

    feature_weights: tuple[float, ...]
    latent_l2: float = Field(default=0.0, ge=0)


class DiffInstructSection(Optimisation):
    """Eqs. 11-12. Pairs of numbers are (start, end) of a linear schedule."""

    online_lr: float = Field(gt=0)
    online_ratio: int = Field(default=1, gt=0)
    guidance: float = Field(default=1.75, ge=1)
    alpha: tuple[float, float] = (1.0, 0.8)
    lambda_fm: tuple[float, float] = (1.0, 0.2)
    t_min: float = Field(default=0.02, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.99)
    feature_weights: tuple[float, ...]
    latent_l2: float = Field(default=0.0, ge=0)


class EvaluationSection(Section):
    """How many images of each split; the teacher's steps and guidance."""

    train_images: int = Field(gt=0)
    heldout_images: int = Field(gt=0)
    teacher_steps: int = 25
    teacher_guidance: float = 3.0


class DistillRecipe(Section):
    """Turns a teacher into a one-step bundle: pairs, decoder, unet, warmup, diff_instruct, evaluation."""

    kind: Literal["distill"]
    name: str
    world: str
    teacher: str
    seed: int = 0
    pairs: PairsSection
    compositions: PairsSection | None = None  # samples of recombined captions too, for the U-Net
    decoder: DecoderSection
    unet: ShrinkSection
    warmup: WarmupSection
    diff_instruct: DiffInstructSection | None = None
    evaluation: EvaluationSection


Recipe = Annotated[TeacherRecipe | DistillRecipe, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[TeacherRecipe | DistillRecipe] = TypeAdapter(Recipe)


def digest(value: BaseModel | Any) -> str:
    """sha256 of the canonical JSON of a recipe, a section of one, or plain data; first 16 hex digits."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def built_in() -> list[str]:
    """Names of the recipes that ship with the trainer."""
    return sorted(
        p.name.removesuffix(".toml") for p in resources.files("trainer.recipes").iterdir() if p.name.endswith(".toml")
    )


def load(name_or_path: str) -> TeacherRecipe | DistillRecipe:
    """Read a recipe by built-in name or file path.

    Raises:
        NotFound: neither a built-in name nor a file.
        InvalidRequest: the file is not TOML or a field is missing, unknown or out of range; names the field.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = Path(str(resources.files("trainer.recipes") / f"{name_or_path}.toml"))
    if not path.is_file():
        raise NotFound(f"recipe {name_or_path!r}: no such file, and not one of {', '.join(built_in())}")
    try:
        return _validated(tomllib.loads(path.read_text(encoding="utf8")))
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest("recipe", str(path), f"TOML ({error})") from error


def of_bundle(folder: Path) -> DistillRecipe:
    """The recipe that a bundle carries.

    Raises:
        InvalidRequest: it carries none, or one that this version cannot read; names the field.
    """
    path = folder / "recipe.json"
    found = _validated(json.loads(path.read_text(encoding="utf8"))) if path.is_file() else None
    if not isinstance(found, DistillRecipe):
        raise InvalidRequest("model", str(folder), "a bundle that carries the recipe it was distilled by, recipe.json")
    return found


def _validated(data: dict[str, Any]) -> TeacherRecipe | DistillRecipe:
    """Raises InvalidRequest with the name of the first field that is missing, unknown or out of range."""
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "kind"  # the first part is the kind itself
        raise InvalidRequest(f"recipe.{where}", first.get("input"), first["msg"]) from error
