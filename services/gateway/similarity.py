"""Frames that would look like the one before them: found, so that they are not drawn.

Two frames are similar when everything but their images is equal, and each image, shrunk to 32x32 RGB, differs by no more than a threshold
from its forerunner in the frame that was drawn last (not in the frame before: slow drift adds up and is drawn).
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image

from sdxs import control
from services.gateway import checks
from services.gateway.checks import Order

_SIDE = 32


@dataclass(eq=False)
class _Drawn:
    """A frame that is or was drawn, as later ones are compared with it."""

    frame_id: int
    said: tuple[Any, ...]
    images: list[np.ndarray]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    answered: bool = False


class SimilarityFilter:
    """That of one session.

    Args:
        threshold: mean absolute difference in levels of 255; 0: no frame is similar.
        max_skips: after so many in a row the next frame is drawn.
    """

    def __init__(self, threshold: float, max_skips: int) -> None:
        self._threshold = threshold
        self._max_skips = max_skips
        self._skips = 0
        self._last: _Drawn | None = None

    async def standing(self, frame_id: int, order: Order) -> int | None:
        """Id of the frame whose image will do; None: this one is to be drawn, and `end` must follow. Raises InvalidRequest."""
        if not self._threshold:
            return None
        images = await asyncio.to_thread(_shrunk, order)
        last, said = self._last, _said(order)
        if last is not None and self._skips < self._max_skips and said == last.said and self._close(images, last.images):
            await last.ended.wait()  # it may still be decoded, and fail
            if last.answered:
                self._skips += 1
                return last.frame_id
        self._skips = 0
        self._last = _Drawn(frame_id, said, images)
        return None

    def end(self, frame_id: int, answered: bool) -> None:
        """Say whether the frame got its image; the first word counts."""
        if self._last is not None and self._last.frame_id == frame_id and not self._last.ended.is_set():
            self._last.answered = answered
            self._last.ended.set()

    def _close(self, ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
        """Whether no image has changed much."""
        return all(np.abs(a - b).mean() <= self._threshold for a, b in zip(ours, theirs, strict=True))


def _shrunk(order: Order) -> list[np.ndarray]:
    """Each image of the order, int16 (32, 32, 3). Raises InvalidRequest."""
    found = (PIL.Image.fromarray(control.read_image(data, name)) for name, data in checks.images(order))
    return [np.asarray(image.resize((_SIDE, _SIDE), PIL.Image.Resampling.BOX), np.int16) for image in found]


def _said(order: Order) -> tuple[Any, ...]:
    """All but the images; which of them there are is part of it."""
    controls = tuple((each.type, each.controlnet, each.scale, each.guess, each.preprocessed) for each in order.controls)
    return (
        order.model.digest,
        order.size,
        order.prompt,
        order.seeds,
        order.format,
        order.deterministic,
        controls,
        bool(order.init_image),
        order.strength,
        order.loras,
    )
