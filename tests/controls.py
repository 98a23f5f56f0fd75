"""A tiny teacher with a ControlNet, its samples with their images, and a base to learn on: what the tests of control stages share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdxs.store import FileStore
from tests.models import tiny_recipe, tiny_teacher
from trainer.artifacts import Artifacts
from trainer.models.controlnets import from_unet
from trainer.models.students import shrink
from trainer.pairs import Pairs, PairsOrder, draw_pairs
from trainer.placement import Placement
from trainer.recipe import ControlRecipe
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Teacher, TeacherClient
from trainer.triplets import SampleImages, draw_images

SHAPE, CAPTIONS, STEPS = (8, 4, 4), ["a red circle", "blue star", "green square"], 3
IMAGES = ("images", "0123")


def tiny_controlnet(unet: Path, folder: Path, seed: int = 1, strength: float = 0.2) -> Path:
    """A ControlNet of a U-Net whose zero convolutions are not zero."""
    torch.manual_seed(seed)
    made = from_unet(UNet2DConditionModel.from_pretrained(unet), 8)
    for name, weight in made.named_parameters():
        if name.startswith("controlnet_") and weight.dim() > 1:
            nn.init.normal_(weight, std=strength)
    made.save_pretrained(folder)
    return folder


def control_recipe(teacher: Path, controlnet: Path, base: str = "unused", steps: int = STEPS) -> dict[str, Any]:
    """A distillation of the ControlNet of `tiny_teacher`."""
    size, parts = {"steps": steps, "batch": 4, "lr": 1e-3}, tiny_recipe(teacher, steps)
    return {
        "kind": "control", "name": "tiny", "world": "scenes", "base": base, "teacher": str(teacher), "controlnet": str(controlnet),
        "conditions": ["edge", "sketch", "colour"], "pairs": parts["pairs"], "unet": dict(size), "shrink": {**size, "ema": 0.9},
        "warmup": {**parts["warmup"], "fresh_noise": 0.3}, "diff_instruct": {**parts["diff_instruct"], "fresh_noise": 0.3, "ema": 0.9},
        "evaluation": {"train_images": 4, "heldout_images": 4, "teacher_steps": 2},
    }  # fmt: skip


@dataclass(frozen=True)
class ControlWorld:
    """What the control stages begin with. Their teacher is asked through a client of the caller's."""

    folder: Path
    pairs: Pairs
    images: SampleImages

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def controlnet(self) -> Path:
        return self.folder / "controlnet"

    @property
    def inputs(self) -> dict[str, Path]:
        return {"unet": self.folder / "student", "base": self.folder / "base", "control_shrink": self.folder / "shrunk"}

    def client(self) -> TeacherClient:
        """The teacher with its ControlNet, in this process."""
        loaded = Teacher(self.teacher)
        loaded.attach(self.controlnet)
        return InProcessTeacher(loaded)

    def recipe(self, steps: int = STEPS, **sections: dict[str, Any]) -> ControlRecipe:
        data = control_recipe(self.teacher, self.controlnet, steps=steps)
        return ControlRecipe.model_validate(
            data | {name: {**data.get(name, {}), **change} for name, change in sections.items()}
        )

    def context(
        self, client: TeacherClient, placement: Placement | None = None, recipe: ControlRecipe | None = None
    ) -> StageContext:
        recipe, placement = recipe or self.recipe(), placement or Placement()
        return StageContext(recipe, self.teacher, client, self.pairs, self.inputs, placement, sample_images=self.images)


def control_world(folder: Path) -> ControlWorld:
    """Made in seconds: the base is a student of other weights than the one that the ControlNet first learns on."""
    teacher = tiny_teacher(folder / "teacher")
    tiny_controlnet(teacher / "unet", folder / "controlnet")
    shrink(UNet2DConditionModel.from_pretrained(teacher / "unet")).save_pretrained(folder / "student" / "unet")
    other = UNet2DConditionModel.from_pretrained(tiny_teacher(folder / "other", seed=2) / "unet")
    shrink(other).save_pretrained(folder / "base" / "unet")
    tiny_controlnet(folder / "student" / "unet", folder / "shrunk" / "controlnet", seed=3, strength=0.02)
    recipe = ControlRecipe.model_validate(control_recipe(teacher, folder / "controlnet"))
    client = InProcessTeacher(Teacher(teacher))
    pairs = draw_pairs(client, PairsOrder.of(CAPTIONS, recipe.pairs, SHAPE, 1), lambda _done: None)
    artifacts = Artifacts(FileStore(folder / "store"), folder / "cache")
    draw_images(client, pairs, "png", artifacts, IMAGES, lambda _done: None)
    return ControlWorld(folder, pairs, SampleImages.load(artifacts.fetch(*IMAGES)))
