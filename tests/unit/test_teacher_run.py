"""`sdxs train <world>-teacher`: one process, resumable, and what it leaves is what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdxs.errors import InvalidRequest
from trainer.recipe import TeacherRecipe, load
from trainer.teacher_run import train_teacher

SHRUNK: dict[str, dict[str, Any]] = {
    "judge": {"steps": 2, "batch": 4, "warmup": 1},
    "autoencoder": {"steps": 2, "batch": 2, "warmup": 1},
    "denoiser": {"steps": 2, "batch": 2, "warmup": 1, "views": 8},
}


def recipe(**changes: dict[str, Any]) -> TeacherRecipe:
    data = load("scenes-teacher").model_dump(mode="json")
    for section, values in SHRUNK.items():
        data[section] |= values | changes.get(section, {})
    return TeacherRecipe.model_validate(data)


@pytest.mark.timeout(180)
def test_a_teacher_run_ends_as_a_pipeline_with_its_recipe_and_curves(tmp_path: Path) -> None:
    train_teacher(recipe(), tmp_path)
    teacher = tmp_path / "teacher"
    assert StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None).unet.config.sample_size == 8
    assert TeacherRecipe.model_validate_json((teacher / "recipe.json").read_text()) == recipe()
    curves = [json.loads(line) for line in (teacher / "training.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in curves] == [("judge", 2), ("autoencoder", 2), ("denoiser", 2)]
    assert json.loads((tmp_path / "judge" / "judge.json").read_text())["renders"] == 2000
    weights = (teacher / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    train_teacher(recipe(), tmp_path)  # nothing left to do
    assert (teacher / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    with pytest.raises(InvalidRequest, match="another recipe") as caught:
        train_teacher(recipe(denoiser={"steps": 3}), tmp_path)
    assert caught.value.field == "output"


@pytest.mark.timeout(180)
def test_a_teacher_learns_from_images_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXS_STORE_URL", f"file://{tmp_path}/store")
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (40, 36), name).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"a {name} wall")
    data = recipe().model_dump(mode="json") | {"world": None, "judge": None, "images": {"images": str(photos), "size": 32}}
    own = TeacherRecipe.model_validate(data)
    train_teacher(own, tmp_path / "out")
    teacher = tmp_path / "out" / "teacher"
    pipeline = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    assert pipeline.tokenizer.tokenize("a green wall")[1].startswith("gr")
    assert "captioned images of 32 pixels" in (teacher / "README.md").read_text()
    assert not (tmp_path / "out" / "judge").exists()


def test_a_teacher_has_one_source_and_a_judge_only_of_a_world() -> None:
    data = recipe().model_dump(mode="json")
    for change in ({"world": None}, {"judge": None}, {"images": {"images": "photos", "size": 32}}):
        with pytest.raises(ValueError, match=r"world or images|judge"):
            TeacherRecipe.model_validate(data | change)
