"""Sketches for training, made from an image's edges: what a hand draws is simpler, shakier and more broken than what Canny finds."""

from __future__ import annotations

import cv2
import numpy as np

from sdxs.control.sketch import REFERENCE, pen

Image = np.ndarray
WORK = 256  # pixels of a side that lines are displaced and smoothed at, for images of up to as many


def hand_drawn(image_HWC: Image, rng: np.random.Generator) -> Image:
    """White strokes on black, uint8 (H, H, 3): the edges of a square RGB image as a hand would draw them, another time each.

    Small parts are left out, lines are smooth, displaced by a slowly varying error, interrupted, and one or two pixels thick at 64 pixels.
    """
    size = image_HWC.shape[0]
    unit = size / REFERENCE
    lines_HW = _without_details(_outlines(image_HWC, unit, rng), unit, rng)
    lines_HW = _interrupted(lines_HW, unit, rng)
    if round(unit) > 1:
        lines_HW = cv2.dilate(lines_HW, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (round(unit), round(unit))))
    work = max(WORK, size)
    fine = cv2.resize(lines_HW, (work, work), interpolation=cv2.INTER_NEAREST)
    fine = cv2.remap(fine, *_displaced(work, work / REFERENCE, rng), cv2.INTER_LINEAR)
    drawn = pen(fine, size, rng.uniform(0.35, 0.6), rng.uniform(35, 70))
    return np.repeat(drawn[..., None], 3, axis=2)


def _outlines(image_HWC: Image, unit: float, rng: np.random.Generator) -> Image:
    """Canny's edges with thresholds of any strictness, often after a blur that removes texture, and with it makes edges as much less
    steep as an image is larger."""
    blur, steepness = rng.uniform(0, 1.4) * unit, 1.0
    if blur > 0.4 * unit:
        image_HWC, steepness = cv2.GaussianBlur(image_HWC, (0, 0), blur), min(1.0, 1 / unit)
    low = rng.uniform(30, 120) * steepness
    edges: Image = cv2.Canny(image_HWC, low, low * rng.uniform(1.5, 2.5))
    return edges


def _without_details(lines_HW: Image, unit: float, rng: np.random.Generator) -> Image:
    """Connected lines that are short are mostly left out, others sometimes."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(lines_HW, connectivity=8)
    if count < 2:
        return lines_HW
    length = stats[:, cv2.CC_STAT_AREA] / unit
    longest = length[1:].max()
    chance = np.where(length < 6, 0.3, 0.85)
    kept = rng.random(count) < np.where(length >= longest, 1.0, chance)
    kept[0] = False
    return np.where(kept[labels], np.uint8(255), np.uint8(0))


def _interrupted(lines_HW: Image, unit: float, rng: np.random.Generator) -> Image:
    """Gaps of a few pixels, about one in 25 pixels of line."""
    ys, xs = np.nonzero(lines_HW)
    if not len(ys):
        return lines_HW
    broken = lines_HW.copy()
    for at in rng.integers(len(ys), size=rng.poisson(rng.uniform(0, 1) * len(ys) / unit / 25)):
        cv2.circle(broken, (int(xs[at]), int(ys[at])), max(1, round(rng.uniform(0.8, 2.5) * unit)), 0, -1)
    return broken


def _displaced(size: int, unit: float, rng: np.random.Generator) -> tuple[Image, Image]:
    """Where each pixel comes from: a small turn, stretch and shift of the whole, and an error that varies slowly."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) - size / 2
    angle, stretch = np.deg2rad(rng.normal(0, 2.0)), 1 + rng.normal(0, 0.03, size=2)
    shift = size / 2 + rng.normal(0, 0.5, size=2) * unit
    turned_y = (np.cos(angle) * y - np.sin(angle) * x) * stretch[0] + shift[0]
    turned_x = (np.sin(angle) * y + np.cos(angle) * x) * stretch[1] + shift[1]
    reach = rng.uniform(0, 1.2) * unit
    error = [_slow_noise(size, rng) * reach for _ in range(2)]
    return (turned_x + error[0]).astype(np.float32), (turned_y + error[1]).astype(np.float32)


def _slow_noise(size: int, rng: np.random.Generator) -> Image:
    """Of unit variance at a grid of 6 by 6 points, cubic between them."""
    noise: Image = cv2.resize(rng.normal(size=(6, 6)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return noise
