"""Images side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

GAP = 2  # white pixels between images


def pixels(image_BCHW: Tensor) -> np.ndarray:
    """[-1, 1] to uint8, shape (B, H, W, 3)."""
    scaled = ((image_BCHW.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    found: np.ndarray = scaled.permute(0, 2, 3, 1).byte().cpu().numpy()
    return found


def grid(rows: Sequence[np.ndarray]) -> Image.Image:
    """Rows of images of one size, each (N, H, W, 3), one under the other."""
    count, height, width, _ = rows[0].shape
    sheet = np.full((len(rows) * (height + GAP) - GAP, count * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
