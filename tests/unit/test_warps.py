"""Images bent out of their usual shape."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.warps import warped


def picture(size: int = 48) -> np.ndarray:
    """A dark disc, left of the middle, on white; uint8 (H, W, 3)."""
    y, x = np.mgrid[0:size, 0:size]
    found = np.full((size, size, 3), 255, np.uint8)
    found[(y - size / 2) ** 2 + (x - size / 3) ** 2 < (size / 5) ** 2] = (30, 60, 90)
    return found


def test_without_strength_an_image_is_itself_or_its_mirror() -> None:
    image = picture()
    found = [warped(image, np.random.default_rng(seed), 0.0) for seed in range(12)]
    kinds = [
        next(name for name, other in (("same", image), ("mirror", image[:, ::-1])) if (one == other).all()) for one in found
    ]
    assert set(kinds) == {"same", "mirror"}


def test_the_same_draws_give_the_same_image() -> None:
    first, again, other = (warped(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_what_enters_at_the_borders_is_as_they_are() -> None:
    plain = np.full((32, 32, 3), (10, 200, 90), np.uint8)
    assert (warped(plain, np.random.default_rng(0), 2.0) == plain).all()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_places_are_off_as_far_as_is_said(strength: float) -> None:
    centres = []
    for seed in range(400):
        dark = warped(picture(), np.random.default_rng(seed), strength).mean(-1) < 128
        ys, _ = np.nonzero(dark)
        if len(ys):
            centres.append(ys.mean())
    # A shift of 0.07 of the side, a bend of 0.04, and the turn of a disc a sixth of the side off the middle, independent of each other.
    expected = 48 * strength * np.hypot(np.hypot(0.07, 0.03), np.deg2rad(20) / 6)
    assert np.std(centres) == pytest.approx(expected, rel=0.35)
