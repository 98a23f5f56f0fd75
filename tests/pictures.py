"""Image files of a given size for tests of what is done with bytes."""

import io

import numpy as np
import PIL.Image


def noise(side: int, seed: int = 0) -> bytes:
    """A PNG that does not compress: about 3 * side * side bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
