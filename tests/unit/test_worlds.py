"""The two worlds: their captions, splits and pictures."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from sdxs.errors import InvalidRequest, NotFound
from trainer import recipe
from trainer.judge import frechet_distance
from trainer.worlds.base import get_world


@pytest.mark.parametrize(("name", "captions", "held_out"), [("emoji", 848, 85), ("scenes", 720, 72)])
def test_a_tenth_is_held_out_and_every_held_out_word_is_seen_in_training(name: str, captions: int, held_out: int) -> None:
    world = get_world(name)
    train, held = world.captions("train"), world.captions("heldout")
    assert (len(train) + len(held), len(held)) == (captions, held_out)
    assert not set(train) & set(held)
    assert {word for text in held for word in text.split()} <= {word for text in train for word in text.split()}


@pytest.mark.parametrize("name", ["emoji", "scenes"])
def test_each_caption_has_its_own_reference_image(name: str) -> None:
    world = get_world(name)
    captions = [*world.captions("train"), *world.captions("heldout")]
    images = world.reference_images(captions)
    assert images.shape == (len(captions), world.image_size, world.image_size, 3)
    assert len({image.tobytes() for image in images}) >= len(captions) - 2  # two names may share a drawing
    assert world.labels(captions).shape == (len(captions), len(world.heads))


def test_frechet_distance_against_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 6)), rng.normal(0.5, 1.5, size=(300, 6))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_built_in_recipes_load_and_mistakes_name_their_field(tmp_path: object) -> None:
    digests = {recipe.digest(recipe.load(name)) for name in recipe.built_in()}
    assert len(digests) == len(recipe.built_in())
    with pytest.raises(NotFound, match="emoji-teacher"):
        recipe.load("emojy")


def test_a_wrong_recipe_names_the_field(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipes") / "wrong.toml"
    loaded = recipe.load("emoji").model_dump_json()
    assert loaded
    path.write_text('kind = "teacher"\nname = "x"\nworld = "scenes"\nspeed = 3\n')
    with pytest.raises(InvalidRequest) as caught:
        recipe.load(str(path))
    assert caught.value.field.startswith("recipe.")
