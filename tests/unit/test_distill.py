"""Which changes of a recipe make which stages run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdxs.errors import AlreadyExists, NotFound
from sdxs.settings import Settings
from tests.models import tiny_recipe, tiny_teacher
from trainer.cluster import Cluster
from trainer.distill import Distillation
from trainer.recipe import DistillRecipe
from trainer.sources import teacher_folder

STAGES = ["decoder", "unet", "warmup", "diff_instruct"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("models") / "teacher")


def plan(data: dict[str, Any], folder: Path) -> dict[str, str]:
    settings = Settings(store_url=f"file://{folder}", cache_dir=folder / "cache")
    distillation = Distillation(DistillRecipe.model_validate(data), settings, Cluster(), lambda *_: None)
    return {step.name: step.digest for step in distillation.plan()}


@pytest.mark.parametrize(
    ("section", "again"),
    [
        ("pairs", {"pairs", *STAGES}),
        ("compositions", {"compositions", *STAGES}),
        ("decoder", {"decoder"}),
        ("unet", {"unet", "warmup", "diff_instruct"}),
        ("warmup", {"warmup", "diff_instruct"}),
        ("diff_instruct", {"diff_instruct"}),
        ("evaluation", set()),
    ],
)
def test_a_change_reaches_what_reads_it_and_nothing_else(teacher: Path, tmp_path: Path, section: str, again: set[str]) -> None:
    data = tiny_recipe(teacher)
    field = {"pairs": "count", "compositions": "count", "evaluation": "train_images"}.get(section, "steps")
    changed = {**data, section: {**data[section], field: data[section][field] + 1}}
    before, after = plan(data, tmp_path), plan(changed, tmp_path)
    assert {name for name in before if before[name] != after[name]} == again


def test_what_is_not_a_bundle_is_not_replaced(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "photos").mkdir(parents=True)
    settings = Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")
    distillation = Distillation(DistillRecipe.model_validate(tiny_recipe(teacher)), settings, Cluster(), lambda *_: None)
    with pytest.raises(AlreadyExists, match="not a bundle"):  # before any stage, and so before Ray
        distillation.run(output)
    assert (output / "photos").is_dir()


def test_only_a_bare_name_is_an_embedded_teacher(tmp_path: Path) -> None:
    own = tiny_teacher(tmp_path / "my-teacher")
    assert teacher_folder(str(own)) == own.resolve()
    assert teacher_folder("scenes-teacher").parts[-3:] == ("assets", "scenes", "teacher")
    with pytest.raises(NotFound, match="photos-teacher"):
        teacher_folder("photos-teacher")


def test_a_recipe_without_compositions_draws_none(teacher: Path, tmp_path: Path) -> None:
    data = tiny_recipe(teacher)
    without = {name: value for name, value in data.items() if name != "compositions"}
    before, after = plan(data, tmp_path), plan(without, tmp_path)
    assert "compositions" not in after
    assert before["pairs"] == after["pairs"] and before["unet"] != after["unet"]


def test_other_weights_of_the_teacher_make_everything_again(teacher: Path, tmp_path: Path) -> None:
    before = plan(tiny_recipe(teacher), tmp_path)
    other = tiny_teacher(tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text("{}")
    after = plan(tiny_recipe(other), tmp_path)
    assert all(before[name] != after[name] for name in before)


def test_a_card_makes_nothing_again(teacher: Path, tmp_path: Path) -> None:
    other = tiny_teacher(tmp_path / "other")
    before = plan(tiny_recipe(other), tmp_path)
    (other / "README.md").write_text("a card")
    assert plan(tiny_recipe(other), tmp_path) == before
