"""Images to condition maps. Lines are white on black; every map is uint8 (height, width, 3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sdxs.control.images import fit
from sdxs.control.sketch import strokes
from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.sizes import Size

Image = np.ndarray
CANNY = (100, 200)  # thresholds, those of the published edge ControlNets
GRID = 8  # blocks of a colour map along a side
ANNOTATORS = "lllyasviel/Annotators"
ANNOTATED = 512  # pixels of a side that those networks look at, their library's default


def _edge(image_HWC: Image, size: Size) -> Image:
    """Canny at the model's size: a line is one pixel, as in training."""
    import cv2

    return _grey(cv2.Canny(np.ascontiguousarray(fit(image_HWC, size.height, size.width)), *CANNY))


def _colour(image_HWC: Image, size: Size) -> Image:
    """Mean colours of 8 by 8 blocks."""
    import cv2

    blocks = cv2.resize(image_HWC, (GRID, GRID), interpolation=cv2.INTER_AREA)
    found: Image = cv2.resize(blocks, size, interpolation=cv2.INTER_NEAREST)
    return found


def _sketch(image_HWC: Image, size: Size) -> Image:
    return _grey(strokes(image_HWC, size))


def _grey(map_HW: Image) -> Image:
    return np.repeat(map_HW[..., None], 3, axis=2)


def _annotator(kind: str, detector: str) -> Callable[[Image, Size], Image]:
    """A network of the controlnet-aux library, loaded when first asked for.

    It sees a square: an image's sides are brought to multiples of 64 there, 0 among them, and a narrow one is blown up without a bound.
    """

    @functools.cache
    def loaded() -> Any:
        try:
            import controlnet_aux
        except ImportError as error:
            raise PreconditionFailed(f'type {kind!r} needs controlnet-aux: pip install "sdxs[annotators]"') from error
        try:
            return getattr(controlnet_aux, detector).from_pretrained(ANNOTATORS)
        except OSError as error:
            raise PreconditionFailed(
                f"type {kind!r}: the weights of {ANNOTATORS} are not here and cannot be fetched"
            ) from error

    def run(image_HWC: Image, size: Size) -> Image:
        square = fit(image_HWC, ANNOTATED, ANNOTATED)
        found = loaded()(square, detect_resolution=ANNOTATED, image_resolution=ANNOTATED, output_type="np")
        return fit(np.asarray(found, np.uint8), size.height, size.width)

    return run


_PREPROCESSORS: dict[str, Callable[[Image, Size], Image]] = {
    "edge": _edge,
    "sketch": _sketch,
    "colour": _colour,
    "depth": _annotator("depth", "MidasDetector"),
    "lineart": _annotator("lineart", "LineartDetector"),
    "pose": _annotator("pose", "OpenposeDetector"),
}
TYPES = tuple(_PREPROCESSORS)
"""Control types that have a preprocessor; the last three need the extra `annotators`."""


def extract(image_HWC: Image, kind: str, size: int | Size, field: str = "type") -> Image:
    """The map of a control type; one number: a square.

    Raises:
        InvalidRequest: no such type.
        PreconditionFailed: its library is not installed.
    """
    if kind not in _PREPROCESSORS:
        raise InvalidRequest(field, kind, f"one of {', '.join(TYPES)}; or preprocessed, with the map itself as the image")
    return _PREPROCESSORS[kind](image_HWC, Size.of(size))
