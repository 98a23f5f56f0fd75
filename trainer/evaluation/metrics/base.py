"""What a metric needs of a network: features of images. The world's judge, Inception and CLIP all have it."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class ImageFeatures(Protocol):
    """A network that sees images."""

    @property
    def name(self) -> str:
        """Short, as it stands in the heading of a column."""
        ...

    def features(self, image_BHWC: np.ndarray) -> np.ndarray:
        """float64 features, shape (N, F), of uint8 images, shape (N, H, W, 3), of any size."""
        ...
