"""The sizes of images that a model draws: its own, at which it was trained, and others near it."""

from __future__ import annotations

from typing import NamedTuple

from sdxs.errors import InvalidRequest

MAX_AREA = 1.5
"""Most pixels, in those of the model's own size."""


class Size(NamedTuple):
    """Pixels of an image."""

    width: int
    height: int

    @classmethod
    def of(cls, size: int | Size) -> Size:
        """A square for one number."""
        return size if isinstance(size, Size) else cls(size, size)


def bounds(own: int, step: int) -> tuple[int, int]:
    """The shortest and the longest side of a model whose own images are `own` pixels a side: from half of it to twice it."""
    return -(-own // (2 * step)) * step, 2 * own


def chosen(width: int, height: int, own: int, step: int) -> Size:
    """The size asked for; 0: the model's own side.

    Args:
        own: pixels of a side of the images that the model was trained on.
        step: pixels of the image to one of the latent; sides are multiples of it.

    Raises InvalidRequest that names the side.
    """
    found, (shortest, longest) = Size(width or own, height or own), bounds(own, step)
    for name, side in found._asdict().items():
        if side % step or not shortest <= side <= longest:
            raise InvalidRequest(name, side, f"a multiple of {step} from {shortest} to {longest}; 0 for the model's own {own}")
    if found.width * found.height > MAX_AREA * own * own:
        most = f"at most {int(MAX_AREA * own * own)} pixels in all"
        raise InvalidRequest("width", f"{found.width} x {found.height}", most)
    return found
