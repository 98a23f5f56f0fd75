"""A person's drawing as thin strokes: whatever pen, paper and resolution, the same kind of lines that training draws (trainer.strokes)."""

from __future__ import annotations

import numpy as np

from sdxs.sizes import Size

Image = np.ndarray
WORK = 256  # pixels of a side that strokes are thinned at, for models of up to as many
LARGEST = 1024
FAINTEST = 24  # of 255: less contrast than this is paper
REFERENCE = 64  # a pen stroke is one to two pixels of an image of this size


def strokes(image_HWC: Image, size: Size) -> Image:
    """White strokes on black, uint8 (height, width). Nothing drawn gives a black map.

    Args:
        image_HWC: RGB; dark strokes on light or light ones on dark, of any thickness, or a photograph of paper.
    """
    import cv2

    mask = _drawn(_reduced(image_HWC))
    larger = max(1.0, WORK / max(size))
    work = Size(round(larger * size.width), round(larger * size.height))
    lines = thinned(_larger_or_smaller(mask, work))
    width = max(1, round(max(work) / REFERENCE))
    lines = cv2.dilate(lines, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    return pen(lines, size, 0.45, 50)


def pen(lines: Image, size: int | Size, softness: float, threshold: float) -> Image:
    """Lines about a reference pixel thick, at any resolution, as a pen leaves them on an image of that size: corners rounded, uint8.

    Args:
        softness: of the blur that rounds them, in pixels of a reference image.
        threshold: of 255, where ink begins after it; the lower, the thicker.
    """
    import cv2

    soft = cv2.GaussianBlur(lines, (0, 0), softness * max(lines.shape) / REFERENCE)
    thick = (soft > threshold).astype(np.uint8) * 255
    small = cv2.resize(thick, Size.of(size), interpolation=cv2.INTER_AREA)
    return np.where(small > 96, np.uint8(255), np.uint8(0))


def _reduced(image_HWC: Image) -> Image:
    """At most `LARGEST` pixels a side: no pen needs more."""
    import cv2

    longest = max(image_HWC.shape[:2])
    if longest <= LARGEST:
        return image_HWC
    factor = LARGEST / longest
    reduced: Image = cv2.resize(image_HWC, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return reduced


def _drawn(image_HWC: Image) -> Image:
    """Where there is ink, uint8 0 or 1. The paper is what surrounds a place, so shadows on it do not count; ink is whatever differs
    in any colour."""
    import cv2

    paper_dark = np.median(image_HWC.mean(axis=2)) < 128
    page = 255 - image_HWC if paper_dark else image_HWC
    reach = max(3, max(page.shape[:2]) // 8) | 1
    paper = cv2.blur(cv2.morphologyEx(page, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8)), (reach, reach))
    ink = cv2.subtract(paper, page).max(axis=2)
    if ink.max() < FAINTEST:
        return np.zeros(ink.shape, np.uint8)
    _, mask = cv2.threshold(ink, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    found: Image = np.where(ink >= FAINTEST, mask, 0).astype(np.uint8)
    return found


def _larger_or_smaller(mask: Image, size: Size) -> Image:
    """At that size, no line lost on the way down."""
    import cv2

    covered = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    shrinks = max(mask.shape) > max(size)
    found: Image = (covered > (0.15 if shrinks else 0.5)).astype(np.uint8) * 255
    return found


def thinned(mask: Image) -> Image:
    """Lines one pixel wide, uint8 0 or 255: as many as there were, a dot included (Guo and Hall, 1989, with the eight neighbours looked
    up in a table)."""
    import cv2

    lines = (mask > 0).astype(np.uint8)
    while True:
        before = int(lines.sum())
        for table in _TABLES:
            code = cv2.filter2D(lines, cv2.CV_8U, _WEIGHTS, borderType=cv2.BORDER_CONSTANT)
            lines &= 1 - table[code]
        if int(lines.sum()) == before:
            return lines * np.uint8(255)


_WEIGHTS = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], np.float32)  # neighbours from the top, clockwise


def _removable(second: bool) -> Image:
    """For each pattern of neighbours, whether the pixel goes in the first or second half of a round."""
    table = np.zeros(256, np.uint8)
    for code in range(256):
        p = [bool(code >> i & 1) for i in range(8)]
        pieces = sum(not p[i] and (p[(i + 1) % 8] or p[(i + 2) % 8]) for i in (0, 2, 4, 6))
        pairs = min(sum(p[i] or p[(i + 1) % 8] for i in start) for start in ((0, 2, 4, 6), (1, 3, 5, 7)))
        near, here, far, opposite = (p[5], p[6], p[4], p[7]) if second else (p[1], p[2], p[0], p[3])
        table[code] = pieces == 1 and 2 <= pairs <= 3 and not ((near or far or not opposite) and here)
    return table


_TABLES = (_removable(False), _removable(True))
