"""Condition maps of training images: which kind each image gets is drawn, so that one ControlNet learns several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sdxs import control
from trainer.strokes import hand_drawn

Images = np.ndarray


def condition_map(image_HWC: Images, kind: str, rng: np.random.Generator) -> Images:
    """The map of one image, uint8 (H, W, 3). A sketch is as a hand would draw it, and differs from draw to draw."""
    if kind == "sketch":
        return hand_drawn(image_HWC, rng)
    found: Images = control.extract(image_HWC, kind, image_HWC.shape[0])
    return found


def condition_maps(image_BHWC: Images, kinds: Sequence[str], generator: torch.Generator) -> Images:
    """Maps of a batch, each of a kind drawn from `kinds`."""
    chosen = torch.randint(len(kinds), (len(image_BHWC),), generator=generator).tolist()
    seeds = torch.randint(2**62, (len(image_BHWC),), generator=generator).tolist()
    maps = [
        condition_map(image, kinds[kind], np.random.default_rng(seed))
        for image, kind, seed in zip(image_BHWC, chosen, seeds, strict=True)
    ]
    return np.stack(maps)
