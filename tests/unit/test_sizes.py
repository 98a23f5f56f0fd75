"""Sizes of images: which there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxs.errors import InvalidRequest
from sdxs.sizes import Size, bounds, chosen


@given(st.integers(2, 128), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 3000), st.integers(0, 3000))
def test_a_size_is_taken_or_the_side_at_fault_is_named(latent: int, step: int, width: int, height: int) -> None:
    own = latent * step
    size = Size(width or own, height or own)
    fits = not any(side % step or side < own / 2 or side > 2 * own for side in size)
    if fits and size.width * size.height <= 1.5 * own * own:
        assert chosen(width, height, own, step) == size
    else:
        with pytest.raises(InvalidRequest) as caught:
            chosen(width, height, own, step)
        assert caught.value.field in ("width", "height")


@pytest.mark.parametrize("own", [64, 512, 1024])
def test_the_models_own_size_and_usual_ratios_are_drawn(own: int) -> None:
    assert chosen(0, 0, own, 8) == Size(own, own)
    for width, height in ((own, own * 3 // 2), (own * 3 // 2, own), (own * 3 // 4, own), (own // 2, own // 2)):
        assert chosen(width, height, own, 8) == Size(width, height)
    assert bounds(own, 8) == (own // 2, 2 * own)
