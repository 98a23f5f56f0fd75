"""`--dry-run`: every recipe that ships runs small, in this process, to a bundle that paints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sdxs import bundle
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from tests.models import tiny_recipe
from trainer.cluster import Cluster
from trainer.models.families import write_teacher
from trainer.plan import steps
from trainer.preflight.checks import check
from trainer.preflight.dry_run import dry_run, environment, rehearse, rehearse_teacher
from trainer.preflight.small import small_recipe
from trainer.recipe import ControlNetRecipe, ControlRecipe, DistillRecipe, RunRecipe, StyleRecipe, TeacherRecipe, built_in, load

QUICK = ("style-lora", "scenes-control")
ALL = [name for name in built_in() if not isinstance(load(name), TeacherRecipe)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ALL])
@pytest.mark.timeout(600)
def test_a_recipe_that_ships_runs_small(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert isinstance(recipe, RunRecipe)
    before = dict(os.environ)
    told: list[str] = []
    image = rehearse(recipe, tmp_path, told.append)
    assert image.std() > 0
    stages = [line.split()[0] for line in told]
    assert stages == [step.name for step in steps(recipe) if not step.drawn]
    sealed = "control_types.json" if isinstance(recipe, ControlNetRecipe) else "bundle.json"
    assert (tmp_path / "bundle" / sealed).is_file()
    if isinstance(recipe, ControlRecipe):
        assert bundle.read(tmp_path / "bundle").controlnets == {recipe.control_name: recipe.conditions}
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["sdxs-512", "sdxs-512-sd15", "sdxs-1024", "style-lora"])
def test_a_recipe_that_ships_passes_its_checks_before_anything_is_downloaded(name: str) -> None:
    recipe = load(name)
    assert isinstance(recipe, (DistillRecipe, StyleRecipe))
    cluster = Cluster(workers=8, gpus_per_worker=1, gpus_per_teacher=1)
    assert check(recipe, cluster, Settings(), name, fetch=False).folder is None


def test_options_survive_being_made_small(tmp_path: Path) -> None:
    """Image networks, other teachers and a LoRA become small ones of their kind."""
    write_teacher("sd21", tmp_path / "teacher")
    write_teacher("sd21", tmp_path / "other", seed=1)
    data: dict[str, Any] = tiny_recipe(tmp_path / "teacher") | {"offline": {"teacher": str(tmp_path / "other")}}
    vgg = {"encoder": "vgg", "encoder_source": "timm/vgg16", "feature_weights": (1.0,) * 5}
    dino = {"encoder": "dinov2", "encoder_source": "facebook/dinov2-small", "feature_weights": (1.0,) * 4}
    data["warmup"], data["finish"] = data["warmup"] | vgg, data["warmup"] | dino
    data["decoder"]["config"]["latent_channels"] = 4
    data["unet"] |= {"micro_batch": 1, "steps": 100}
    recipe = DistillRecipe.model_validate(data)
    small = small_recipe(recipe, tmp_path / "small")
    assert isinstance(small, DistillRecipe)
    assert (small.unet.steps, small.unet.batch, small.unet.micro_batch) == (2, 4, 2)
    assert small.offline is not None
    assert small.offline.teacher != small.teacher
    assert len({small.teacher, str(tmp_path / "teacher")}) == 2
    check(small, Cluster(), Settings(), "small")  # whose files are all there


def test_a_bad_recipe_ends_before_anything_is_counted(tmp_path: Path) -> None:
    write_teacher("sd21", tmp_path / "teacher")
    recipe = DistillRecipe.model_validate(tiny_recipe(tmp_path / "teacher"))  # of eight latent channels
    console = Console(record=True, quiet=True)
    with pytest.raises(InvalidRequest, match="latent_channels") as caught:
        dry_run(recipe, Cluster(), "mine.toml", console)
    assert "mine.toml" in str(caught.value)
    assert not console.export_text()


def test_the_environment_is_put_back() -> None:
    before = dict(os.environ)
    with environment({"SDXS_CACHE_DIR": "x", "HOME": "y"}):
        assert (os.environ["SDXS_CACHE_DIR"], os.environ["HOME"]) == ("x", "y")
    assert dict(os.environ) == before


def test_a_teacher_recipe_runs_small_too(tmp_path: Path) -> None:
    recipe = load("scenes-teacher")
    assert isinstance(recipe, TeacherRecipe)
    assert {path.name for path in rehearse_teacher(recipe, tmp_path).iterdir()} >= {"unet", "vae", "text_encoder", "tokenizer"}
