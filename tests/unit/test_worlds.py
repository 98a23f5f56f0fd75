"""The two worlds: their captions, splits, labels and pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from sdxs.errors import InvalidRequest
from trainer.worlds import emoji, emoji_list
from trainer.worlds.base import get_world
from trainer.worlds.scenes import ATTRIBUTES, COLOURS, GROUNDS, PLACES, ScenesWorld, caption, draw


@pytest.mark.parametrize(("name", "captions", "held_out"), [("emoji", 848, 85), ("scenes", 720, 72)])
def test_a_tenth_is_held_out_and_every_held_out_word_is_seen_in_training(name: str, captions: int, held_out: int) -> None:
    world = get_world(name)
    train, held = world.captions("train"), world.captions("heldout")
    assert (len(train) + len(held), len(held)) == (captions, held_out)
    assert len({*train, *held}) == captions  # each stands once
    assert {word for text in held for word in text.split()} <= {word for text in train for word in text.split()}
    assert {*train, *held} <= set(world.vocabulary())


@pytest.mark.parametrize("name", ["emoji", "scenes"])
def test_each_caption_has_its_own_reference_image(name: str) -> None:
    world = get_world(name)
    captions = [*world.captions("train"), *world.captions("heldout")]
    images = world.reference_images(captions)
    assert images.shape == (len(captions), world.image_size, world.image_size, 3)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) >= len(captions) - 2  # two names may share a drawing
    labels = world.labels(captions)
    assert labels.shape == (len(captions), len(world.heads))
    assert [labels[:, i].max() + 1 for i in range(labels.shape[1])] == list(world.heads.values())


def test_an_unknown_world_lists_the_known() -> None:
    with pytest.raises(InvalidRequest, match=r"world.*photos.*one of emoji, scenes"):
        get_world("photos")


def test_scenes_are_all_products_of_their_attributes() -> None:
    world = ScenesWorld()
    expected = {caption(scene) for scene in itertools.product(*ATTRIBUTES.values())}  # type: ignore[arg-type]
    assert expected == {*world.captions("train"), *world.captions("heldout")}
    assert caption(("small", "red", "circle", "left", "black")) == "a small red circle at the left on black"


def test_scene_labels_are_readable_from_the_caption() -> None:
    world = ScenesWorld()
    for text, row in zip(world.captions("heldout"), world.labels(world.captions("heldout")), strict=True):
        _, size, colour, shape, _, _, place, _, ground = text.split()
        words = [values[label] for values, label in zip(ATTRIBUTES.values(), row, strict=True)]
        assert words == [size, colour, shape, place, ground]


@pytest.mark.parametrize("changed", range(5))
def test_every_attribute_shows_in_the_drawing(changed: int) -> None:
    scene, values = ["large", "red", "star", "left", "black"], list(ATTRIBUTES.values())[changed]
    images = []
    for value in values:
        scene[changed] = value
        images.append(draw((scene[0], scene[1], scene[2], scene[3], scene[4])).astype(float))
    for one, other in itertools.combinations(images, 2):
        assert np.abs(one - other).mean() > 1.5


@pytest.mark.parametrize(("place", "colour", "ground"), itertools.product(PLACES, COLOURS, GROUNDS))
def test_a_drawn_circle_is_where_how_large_and_of_which_colour_the_caption_says(place: str, colour: str, ground: str) -> None:
    for size, radius in (("small", 5), ("large", 9)):
        image = draw((size, colour, "circle", place, ground)).astype(float)
        inside = np.abs(image - np.array(COLOURS[colour])).sum(-1) < 30
        rows, columns = np.nonzero(inside)
        assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx(PLACES[place], abs=0.5)
        assert inside.sum() == pytest.approx(np.pi * radius**2, rel=0.2)
        np.testing.assert_array_equal(image[0, 0] if place != "left" else image[0, -1], GROUNDS[ground])


def test_training_scenes_are_of_the_training_captions_and_vary() -> None:
    world = ScenesWorld()
    images, captions = world.training_images(200, np.random.default_rng(0))
    again, same = world.training_images(200, np.random.default_rng(0))
    assert captions == same and np.array_equal(images, again)
    assert set(captions) <= set(world.captions("train"))
    gap = np.abs(images.astype(float) - world.reference_images(captions)).mean((1, 2, 3))
    assert (gap > 0).mean() > 0.95  # jittered
    others = world.reference_images(captions[1:] + captions[:1])
    assert gap.mean() < 0.3 * np.abs(images.astype(float) - others).mean()  # yet of their own caption
    held, _ = world.training_images(5, np.random.default_rng(0), "heldout")
    assert held.shape == (5, 32, 32, 3)


def test_judged_scenes_cover_both_splits() -> None:
    world = ScenesWorld()
    images, labels = world.judge_images(300, np.random.default_rng(0))
    assert images.shape == (300, 32, 32, 3) and labels.shape == (300, 5)
    rows = {tuple(row) for row in labels.tolist()}
    for split in ("train", "heldout"):
        assert rows & {tuple(row) for row in world.labels(world.captions(split)).tolist()}


def test_the_gallery_sheet_is_cut_into_the_right_squares() -> None:
    gallery = emoji.gallery()
    assert gallery.shape == (848, 64, 64, 3)
    sheet = Image.open(emoji_list.ASSETS / "gallery.webp").convert("RGB")
    for i in (0, 31, 32, 500, 847):
        x, y = i % 32 * 64, i // 32 * 64
        np.testing.assert_array_equal(gallery[i], np.asarray(sheet.crop((x, y, x + 64, y + 64))))
    assert (gallery[:, :2] == 255).mean() > 0.99  # on white, with a margin


def test_named_colours_are_seen_in_the_gallery() -> None:
    world = get_world("emoji")
    for colour, channel in (("red", 0), ("blue", 2)):
        [image] = world.reference_images([f"{colour} circle"])
        middle = image[24:40, 24:40].reshape(-1, 3).mean(0)
        assert middle.argmax() == channel and middle[channel] - np.delete(middle, channel).max() > 40


def test_held_out_emoji_are_compositions_and_their_choice_repeats() -> None:
    members = list(emoji.load())
    assert all(member.composition for member in members if member.split == "heldout")
    fresh = [emoji_list.Emoji(m.caption, m.sequence, m.group, m.composition) for m in members]
    assert emoji_list.hold_out(fresh) == members


def test_the_unicode_list_is_parsed_by_group_and_name() -> None:
    text = """# group: People & Body
# subgroup: hand-fingers-closed
1F44D                                                  ; fully-qualified     # 👍 E0.6 thumbs up
1F44D 1F3FF                                            ; fully-qualified     # 👍🏿 E1.0 thumbs up: dark skin tone
1FAF1 1F3FB                                            ; fully-qualified     # 🫱🏻 E14.0 rightwards hand: light skin tone
# subgroup: cat-face
1F63A                                                  ; fully-qualified     # 😺 E0.6 grinning cat
263A                                                   ; unqualified         # ☺ E0.6 smiling face
"""
    found = [(e.caption, e.sequence, e.group, e.composition) for e in emoji_list.parse(text)]
    assert found == [
        ("thumbs up", "👍", "hand-fingers-closed", True),
        ("thumbs up dark skin tone", "👍🏿", "hand-fingers-closed", True),
        ("grinning cat", "😺", "cat-face", False),
    ]
    assert emoji_list.normalise("Piñata: jack-o’-lantern") == "pinata jack-o -lantern"


def test_a_view_names_its_background() -> None:
    master = Image.new("RGBA", (128, 128), (255, 0, 0, 255))
    rng = np.random.default_rng(0)
    for _ in range(20):
        view, text = emoji.augment(master, "heart", rng, background_share=1.0)
        name = text.removeprefix("heart on ").removesuffix(" background")
        corners = {tuple(np.asarray(view)[i, i].tolist()) for i in (0, -1)}  # at most one of them is under the master
        assert emoji.BACKGROUNDS[name] in corners <= {emoji.BACKGROUNDS[name], (255, 0, 0)}
    view, text = emoji.augment(master, "heart", rng, background_share=0.0)
    assert text == "heart"
    assert 255 * 3 in np.asarray(view, dtype=int)[[0, -1], [0, -1]].sum(-1)
    red = (np.asarray(emoji.plain(master)) == (255, 0, 0)).all(-1)
    assert red.sum() == 60 * 60 and red[2:62, 2:62].all()
