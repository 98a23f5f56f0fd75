"""Style transfer arrives: a one-step student moves to the colours of a style that only its offline model has.

The style is a LoRA trained here on the emoji teacher: everything is tinted red.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from sdxs.pipeline import OneStepPipeline
from sdxs.registry import packaged
from trainer.diffusion import Diffusion, sample, stratified_timesteps
from trainer.models import lora
from trainer.pairs import Pairs
from trainer.recipe import StyleRecipe
from trainer.sections import LoraSection
from trainer.sources import latent_shape, load_frozen, teacher_folder
from trainer.specs import TeacherSpec
from trainer.stages import STAGES
from trainer.stages.context import StageContext
from trainer.teacher import InProcessTeacher, Teacher
from trainer.worlds.base import get_world

TEACHER, RANK = "emoji-teacher", 8


def tinted(image_BHWC: np.ndarray) -> np.ndarray:
    """Half as bright, and red: +128 of 255."""
    found: np.ndarray = image_BHWC.astype(np.float32) * 0.5 + np.array([127.5, 0, 0], np.float32)
    return found


def redness(image_BHWC: np.ndarray) -> float:
    """Mean of red over that of green and blue, in levels of 255."""
    red, green, blue = np.asarray(image_BHWC, np.float64).reshape(-1, 3).mean(0)
    return float(red - (green + blue) / 2)


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A style LoRA for the teacher, trained as style LoRAs are: the denoising loss on images of the style."""
    teacher, rng = Teacher(teacher_folder(TEACHER)), np.random.default_rng(0)
    images, captions = get_world("emoji").training_images(256, rng)
    with torch.no_grad():
        latent_NCHW = teacher.encode(torch.from_numpy(tinted(images)))
    unet = load_frozen(UNet2DConditionModel, teacher.folder / "unet")
    lora.attach(unet, RANK, targets=lora.EVERYWHERE)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=3e-3)
    diffusion, generator = Diffusion.of(teacher.folder), torch.Generator().manual_seed(0)
    for _ in range(80):
        index = torch.randint(len(captions), (16,), generator=generator)
        t_B, noise = stratified_timesteps(16, 0, 1000, generator), torch.randn(16, *latent_NCHW.shape[1:], generator=generator)
        noisy, text = diffusion.diffuse(latent_NCHW[index], noise, t_B), teacher.text.encode([captions[i] for i in index])
        loss = F.mse_loss(unet(noisy, t_B, **text.arguments()).sample, diffusion.target(latent_NCHW[index], noise, t_B))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("style")
    lora.save_adapter(unet.state_dict(), folder, RANK)
    return folder


def teacher_images(teacher: Teacher, captions: list[str]) -> np.ndarray:
    """Its own, in eight steps."""
    noise = torch.randn(len(captions), *latent_shape(teacher.folder), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        latent = sample(teacher.guided(captions, 1.0), noise, teacher.scheduler_config, 8)
        return ((teacher.decode(latent).clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()


def student_images(folder: Path, captions: Sequence[str]) -> np.ndarray:
    """A bundle's."""
    pipeline = OneStepPipeline.from_bundle(folder)
    return np.stack([pipeline.generate(caption, seed) for seed, caption in enumerate(captions)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_style_in_the_offline_model_alone_colours_the_student(style: Path, tmp_path: Path) -> None:
    captions = get_world("emoji").captions("train")
    data = {
        "kind": "style", "name": "red", "world": "emoji", "base": "emoji", "teacher": TEACHER, "style": {"path": str(style)},
        "evaluation": {"train_images": 1, "heldout_images": 1},
        "lora": {
            "steps": 40, "batch": 8, "lr": 3e-3, "online_lr": 1e-4, "guidance": 1.0, "alpha": (0.98, 0.98), "lambda_fm": (0.0, 0.0),
            "feature_weights": (), "rank": RANK,
        },
    }  # fmt: skip
    recipe = StyleRecipe.model_validate(data)
    styled = Teacher.load(TeacherSpec(TEACHER, lora=LoraSection(path=str(style))))
    prompts = Pairs.of_prompts(captions, latent_shape(styled.folder), 0)
    bundle = {"base": packaged()["emoji"]}
    stage = STAGES["style"](StageContext(recipe, teacher_folder(TEACHER), InProcessTeacher(styled), prompts, bundle))
    for step in range(stage.steps):
        stage.step(step)
    stage.export(tmp_path)
    shutil.copytree(bundle["base"], tmp_path / "red", ignore=shutil.ignore_patterns("unet", "bundle.json"))
    (tmp_path / "unet").rename(tmp_path / "red" / "unet")
    few = captions[:: len(captions) // 16][:16]
    before, after = (redness(student_images(folder, few)) for folder in (bundle["base"], tmp_path / "red"))
    plain, wanted = (redness(teacher_images(one, few)) for one in (Teacher(teacher_folder(TEACHER)), styled))
    assert wanted - plain > 60, "the LoRA is a style"
    assert after - before > 0.35 * (wanted - plain), "and the student has it: 67 of 136 where this was written"
