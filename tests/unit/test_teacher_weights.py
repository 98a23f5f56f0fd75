"""Teachers whose weights are stored in 16 bits, and teachers that compute in them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.models import tiny_recipe, tiny_teacher
from trainer.pairs import Pairs
from trainer.recipe import DistillRecipe
from trainer.sources import load_frozen, load_network
from trainer.specs import TeacherSpec
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import Array, Denoise, InProcessTeacher, Sample, Teacher

SHAPE, CAPTIONS = (8, 4, 4), ["a red circle", "blue star", "green square"]
STRAIGHTEN = {"steps": 2, "batch": 4, "lr": 1e-3, "grid": 10, "samples": {"count": 4, "steps": 2, "guidance": 2.0}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One teacher with weights rounded to float16 thrice: stored wide, stored in 16 bits, and as an `fp16` variant alone."""
    folder = tmp_path_factory.mktemp("teachers")
    made = {name: folder / name for name in ("wide", "half", "variant")}
    tiny_teacher(made["wide"])
    for name in ("half", "variant"):
        shutil.copytree(made["wide"], made[name])
    for path in made["wide"].rglob("*.safetensors"):
        half = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        save_file(
            {name: value.float() if value.dtype == torch.float16 else value for name, value in half.items()},
            path,
            {"format": "pt"},
        )
        inside = path.relative_to(made["wide"])
        save_file(half, made["half"] / inside, {"format": "pt"})
        save_file(half, (made["variant"] / inside).with_suffix(".fp16.safetensors"), {"format": "pt"})
        (made["variant"] / inside).unlink()
    return made


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    """Two steps of a stage."""
    recipe = DistillRecipe.model_validate(tiny_recipe(folder, 2) | {"straighten": STRAIGHTEN})
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).half()
    context = StageContext(recipe, folder, InProcessTeacher(Teacher(folder)), Pairs(latents, torch.arange(3), CAPTIONS), {})
    stage = STAGES[name](context)
    return [{key: float(torch.as_tensor(value).detach()) for key, value in stage.step(i).items()} for i in range(stage.steps)]


@pytest.mark.parametrize("name", ["unet", "straighten"])
def test_stages_that_start_from_the_teachers_unet_take_it_as_it_is_stored(folders: dict[str, Path], name: str) -> None:
    expected = curve(folders["wide"], name)
    assert len(expected) == 2 and all(np.isfinite(list(line.values())).all() for line in expected)
    assert curve(folders["half"], name) == expected
    assert curve(folders["variant"], name) == expected


def test_a_network_to_train_has_gradients_and_a_frozen_one_has_none(folders: dict[str, Path]) -> None:
    for load, learns in ((load_network, True), (load_frozen, False)):
        unet: Any = load(UNet2DConditionModel, folders["variant"] / "unet")
        assert {(p.requires_grad, p.dtype) for p in unet.parameters()} == {(learns, torch.float32)}


def test_the_plain_weights_are_taken_before_any_variant(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["wide"] / "unet", tmp_path / "unet")
    plain = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    zeros = {name: torch.zeros_like(value).half() for name, value in load_file(plain).items()}
    for variant in ("fp16", "non_ema"):
        save_file(zeros, plain.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    assert load_network(UNet2DConditionModel, tmp_path / "unet").conv_in.weight.abs().max() > 0
    plain.unlink()
    assert load_network(UNet2DConditionModel, tmp_path / "unet").conv_in.weight.abs().max() == 0


def answers(folder: Path, precision: Any) -> list[Array]:
    """Guided outputs with a feature, and samples, of a teacher that computes in a precision."""
    teacher = Teacher.load(TeacherSpec(str(folder), precision))
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).numpy()
    asked = Denoise(noise, np.array([20, 500, 999]), CAPTIONS, 3.0, ("up_blocks.0",))
    guided = [part[: len(noise)] for part in teacher.answer(asked)]
    return [part.astype(np.float64) for part in [*guided, *teacher.answer(Sample(noise, CAPTIONS, 3, 2.0))]]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.004)])
def test_a_teacher_in_16_bits_answers_as_in_32(folders: dict[str, Path], precision: str, tolerance: float) -> None:
    """Root mean square of the differences to that of the answers; bfloat16 has 8 bits of mantissa, float16 eleven."""
    for found, expected in zip(answers(folders["wide"], precision), answers(folders["wide"], "float32"), strict=True):
        assert np.isfinite(found).all()
        error = float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))
        assert 1e-5 < error < tolerance
