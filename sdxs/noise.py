"""The noise of a request: a function of its seed alone, on any machine, in any batch. No torch."""

from __future__ import annotations

import numpy as np

from sdxs.errors import InvalidRequest

MAX_SEED = 2**64 - 1
MAX_IMAGES = 16
"""Of one request."""


def latent_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of one image from numpy's counter-based Philox generator.

    Args:
        seed: 0 to 2^64 - 1. Image i of a request uses seed + i, modulo 2^64.
        shape: (C, H, W) of the latent.

    Returns:
        float32 array of `shape`.

    Raises:
        InvalidRequest: the seed is out of range.
    """
    _check(seed)
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, dtype=np.float32)


def image_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the `count` images of one request: seed, seed + 1, ... modulo 2^64. Raises InvalidRequest."""
    _check(seed)
    return [(seed + i) % (MAX_SEED + 1) for i in range(count)]


def _check(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise InvalidRequest("seed", seed, f"an integer from 0 to {MAX_SEED}")
