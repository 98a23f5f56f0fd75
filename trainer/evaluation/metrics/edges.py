"""How closely an image keeps to a condition: edges against edges, and coarse colours against colours."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from sdxs import control

REFERENCE = 64  # pixels of a side at which an edge may be one pixel off
BLOCKS = 8  # a side, of a colour map


def tolerance(size: int) -> int:
    """Pixels that an edge may be off, along either axis, in images of `size` pixels a side: 1 at 64 and below, 8 at 512."""
    return max(1, round(size / REFERENCE))


def edge_f1(found_HW: np.ndarray, wanted_HW: np.ndarray, tolerance: int = 1) -> float:
    """Harmonic mean of precision and recall of edge pixels, as in BSDS but without matching one to one.

    Precision is the share of `found` pixels with a `wanted` one at most `tolerance` pixels away along either axis, recall the same the
    other way round. Two blank maps agree (1); a blank one and another do not (0).

    Args:
        found_HW: true at edges of the image.
        wanted_HW: true at edges that were asked for.
    """
    if not found_HW.any() or not wanted_HW.any():
        return float(found_HW.any() == wanted_HW.any())
    precision = float((_distance(wanted_HW)[found_HW] <= tolerance).mean())
    recall = float((_distance(found_HW)[wanted_HW] <= tolerance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _distance(edges_HW: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest edge, the larger of both axes. 3 is the only mask that cv2 has for it, and exact."""
    distance: np.ndarray = cv2.distanceTransform((~edges_HW).astype(np.uint8), cv2.DIST_C, 3)
    return distance


def lines(map_HWC: np.ndarray) -> np.ndarray:
    """True where an edge or sketch map (H, W, 3) in uint8 has a line."""
    found: np.ndarray = map_HWC.max(-1) > 127
    return found


def mean_edge_f1(image_NHWC: np.ndarray, map_NHWC: Sequence[np.ndarray] | np.ndarray) -> float:
    """Mean over images of the F1 of their Canny edges, taken as the edge condition takes them, against the lines of their maps."""
    size = image_NHWC.shape[1]
    scores = [
        edge_f1(lines(control.extract(image, "edge", size)), lines(wanted), tolerance(size))
        for image, wanted in zip(image_NHWC, map_NHWC, strict=True)
    ]
    return float(np.mean(scores))


def colour_error(image_NHWC: np.ndarray, map_NHWC: Sequence[np.ndarray] | np.ndarray) -> float:
    """Mean absolute difference, in levels of 255, of the mean colours of 8 x 8 blocks."""
    pairs = zip(image_NHWC, map_NHWC, strict=True)
    return float(np.mean([np.abs(_blocks(image) - _blocks(wanted)).mean() for image, wanted in pairs]))


def _blocks(image_HWC: np.ndarray) -> np.ndarray:
    blocks: np.ndarray = cv2.resize(image_HWC.astype(np.float32), (BLOCKS, BLOCKS), interpolation=cv2.INTER_AREA)
    return blocks
