"""Images bent out of their usual shape and place. Where every caption has one picture, a ControlNet that only ever sees that picture's own
map has nothing to learn from it: the caption says it all."""

from __future__ import annotations

import cv2
import numpy as np

Image = np.ndarray


def warped(image_HWC: Image, rng: np.random.Generator, strength: float = 1.0) -> Image:
    """A square RGB image, uint8, turned, stretched, moved, mirrored half of the time, and bent; what enters at its borders is as they are.

    Args:
        strength: 1: turns of about 20 degrees, sides stretched by a fifth, places off by a tenth of the side, as standard deviations.
    """
    size = image_HWC.shape[0]
    turn = np.deg2rad(rng.normal(0, 20 * strength))
    stretch = np.exp(rng.normal([0.12 * strength, 0.0], [0.12 * strength, 0.12 * strength]))  # smaller rather than larger
    sides = np.diag([stretch[0] * stretch[1], stretch[0] / stretch[1]]) @ np.diag([rng.choice([-1.0, 1.0]), 1.0])
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ sides
    moved = rng.normal(0, 0.07 * strength * size, 2)
    y, x = np.mgrid[0:size, 0:size].astype(np.float64) - (size - 1) / 2
    bend = [_slow(size, rng) * 0.04 * strength * size for _ in range(2)]
    from_x = turned[0, 0] * x + turned[0, 1] * y + moved[0] + (size - 1) / 2 + bend[0]
    from_y = turned[1, 0] * x + turned[1, 1] * y + moved[1] + (size - 1) / 2 + bend[1]
    found: Image = cv2.remap(
        image_HWC, from_x.astype(np.float32), from_y.astype(np.float32), cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE
    )
    return found


def _slow(size: int, rng: np.random.Generator) -> Image:
    """Noise of unit variance at 4 by 4 points, cubic between them."""
    noise: Image = cv2.resize(rng.normal(size=(4, 4)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return noise
