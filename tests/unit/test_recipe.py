"""Recipes: the built-in ones load, mistakes name their field, the digest follows the science and nothing else."""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sdxs import bundle, registry
from sdxs.errors import InvalidRequest, NotFound
from trainer.recipe import DistillRecipe, TeacherRecipe, built_in, digest, load, of_bundle
from trainer.worlds.base import get_world

SCENES = (resources.files("trainer.recipes") / "scenes.toml").read_text(encoding="utf8")


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf8")
    return str(path)


def holds(found: Any, wanted: Any) -> bool:
    """Whether all that is wanted is there, at any depth."""
    if isinstance(wanted, dict):
        return all(name in found and holds(found[name], value) for name, value in wanted.items())
    return bool(found == wanted)


@pytest.mark.parametrize("name", built_in())
def test_built_in_recipe_is_what_its_file_says(name: str) -> None:
    recipe = load(name)
    data = tomllib.loads((resources.files("trainer.recipes") / f"{name}.toml").read_text(encoding="utf8"))
    assert recipe.kind == data["kind"]
    assert holds(recipe.model_dump(mode="json"), data)
    if recipe.world is not None:
        assert get_world(recipe.world).name == recipe.world
    if isinstance(recipe, DistillRecipe) and recipe.world is not None:
        teacher = load(recipe.teacher)
        assert isinstance(teacher, TeacherRecipe)
        assert recipe.decoder.config["latent_channels"] == teacher.denoiser.unet["in_channels"]
        features = 1 + len(teacher.denoiser.unet["down_block_types"])  # the latent itself, then each down block
        assert recipe.warmup is None or len(recipe.warmup.feature_weights) == features
        assert recipe.diff_instruct is None or len(recipe.diff_instruct.feature_weights) == features


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("[unet]\n", "[unet]\nspeed = 3\n", "recipe.unet.speed"),  # unknown
        (
            "feature_weights = [1.0, 0.5, 0.5, 0.5]\nlatent_l2 = 1.0\n\n[diff",
            "\n[diff",
            "recipe.warmup.feature_weights",
        ),  # missing
        ("count = 4096", "count = 0", "recipe.pairs.count"),
        ('solver = "dpm"', 'solver = "plms"', "recipe.pairs.solver"),
        ("steps = 900", 'steps = "many"', "recipe.unet.steps"),
        ("alpha = [0.95, 0.7]", "alpha = [0.95]", "recipe.diff_instruct.alpha.1"),
        ("steps = 900", "steps = 900\nrestarts = [900]", "recipe.unet"),
        ("steps = 900", "steps = 20", "recipe.unet"),  # ends before its warm-up
        ('world = "scenes"', "", "recipe"),
        ('kind = "distill"', 'kind = "distil"', "recipe.kind"),
        ('kind = "distill"', "", "recipe.kind"),
    ],
)
def test_a_mistake_names_its_field(tmp_path: Path, old: str, new: str, field: str) -> None:
    assert old in SCENES
    with pytest.raises(InvalidRequest) as caught:
        load(write(tmp_path, SCENES.replace(old, new, 1)))
    assert caught.value.field == field


def test_what_ships_carries_the_recipe_of_its_name() -> None:
    shipped = registry.packaged()
    assert list(shipped) == ["emoji"]
    for name, folder in shipped.items():
        assert digest(of_bundle(folder)) == digest(load(name)) == bundle.read(folder).recipe_hash


def test_a_bundle_without_a_readable_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"recipe\.json"):
        of_bundle(tmp_path)
    (tmp_path / "recipe.json").write_text('{"kind": "distill", "name": 3}')
    with pytest.raises(InvalidRequest) as caught:
        of_bundle(tmp_path)
    assert caught.value.field.startswith("recipe.")


def test_what_is_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="TOML") as caught:
        load(write(tmp_path, "kind = = 3"))
    assert caught.value.field == "recipe"


@pytest.mark.parametrize("name", ["emojy", "no/such/file.toml"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(NotFound, match=r"emoji, .*emoji-demo, emoji-quick, emoji-teacher, .*scenes, .*scenes-teacher"):
        load(name)


def test_a_file_is_the_recipe_of_that_name(tmp_path: Path) -> None:
    assert digest(load(write(tmp_path, SCENES))) == digest(load("scenes"))


def test_digest_is_the_hash_of_canonical_json_whatever_the_order() -> None:
    data = {"b": [1, 2.5], "a": {"y": None, "x": "é"}}
    text = '{"a":{"x":"\\u00e9","y":null},"b":[1,2.5]}'
    assert digest(data) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert digest({"a": {"x": "é", "y": None}, "b": [1, 2.5]}) == digest(data)


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all numbers in nested plain data."""
    if isinstance(data, dict):
        return [leaf for key, value in data.items() for leaf in leaves(value, (*path, key))]
    if isinstance(data, list):
        return [leaf for key, value in enumerate(data) for leaf in leaves(value, (*path, key))]
    return [path] if isinstance(data, (int, float)) and not isinstance(data, bool) else []


def test_digest_changes_with_every_number_of_the_recipe() -> None:
    original = load("scenes").model_dump(mode="json")
    found = {digest(load("scenes"))}
    paths = leaves(original)
    for path in paths:
        changed = json.loads(json.dumps(original))
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] += 1e-6
        found.add(digest(changed))
    assert len(found) == len(paths) + 1 > 50


def test_a_recipe_is_frozen_and_gives_its_schedule() -> None:
    recipe = load("scenes")
    assert isinstance(recipe, DistillRecipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.unet.steps = 3  # type: ignore[misc]
    assert [recipe.unet.schedule().rate(step) for step in (0, 20, 900)] == pytest.approx([2e-5, 4e-4, 8e-6])
