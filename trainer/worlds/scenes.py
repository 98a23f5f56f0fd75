"""The `scenes` world: one coloured shape on a coloured ground, 32x32 pixels, drawn by the code below. Trains in minutes.

Every caption states five attributes, so a classifier of those attributes is an exact judge of text alignment.
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

SIZE, OVERSAMPLING = 32, 4
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 200, 40),
    "purple": (150, 60, 190), "orange": (245, 130, 30),
}  # fmt: skip
GROUNDS = {"white": (250, 250, 250), "black": (20, 20, 20), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 5.0, "large": 9.0}
PLACES = {"left": (10, 16), "right": (22, 16), "top": (16, 10), "bottom": (16, 22)}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES, "place": tuple(PLACES), "ground": tuple(GROUNDS),
}  # fmt: skip
HELD_OUT_SHARE = 0.10
Scene = tuple[str, str, str, str, str]


def caption(scene: Scene) -> str:
    """e.g. "a small red circle at the left on black"."""
    size, colour, shape, place, ground = scene
    return f"a {size} {colour} {shape} at the {place} on {ground}"


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        angles, radii = [-90, 30, 150], [radius * 1.15] * 3
    elif shape == "star":
        angles, radii = [-90 + 36 * k for k in range(10)], [radius * (1.15 if k % 2 == 0 else 0.45) for k in range(10)]
    else:  # cross
        thin, thick = radius * 0.35, radius
        corners = [(-thin, -thick), (thin, -thick), (thin, -thin), (thick, -thin), (thick, thin), (thin, thin)]
        corners += [(-a, -b) for a, b in corners]
        return [(x + a, y + b) for a, b in corners]
    return [(x + r * math.cos(math.radians(a)), y + r * math.sin(math.radians(a))) for a, r in zip(angles, radii, strict=True)]


def draw(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """One scene, uint8 (32, 32, 3); with `rng`, place and size vary a little within what the words mean."""
    size, colour, shape, place, ground = scene
    jitter = rng.uniform(-1, 1, size=3) if rng is not None else np.zeros(3)
    x, y = ((PLACES[place][i] + 1.5 * jitter[i]) * OVERSAMPLING for i in range(2))
    radius = SIZES[size] * (1 + 0.08 * jitter[2]) * OVERSAMPLING
    canvas = Image.new("RGB", (SIZE * OVERSAMPLING,) * 2, GROUNDS[ground])
    pen, box = ImageDraw.Draw(canvas), (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(tuple(0.85 * (v - c) + c for v, c in zip(box, (x, y, x, y), strict=True)), fill=COLOURS[colour])
    else:
        pen.polygon(_outline(shape, x, y, radius), fill=COLOURS[colour])
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


class ScenesWorld:
    """720 captions, 10% of them held out of training."""

    name, image_size, retrieval = "scenes", SIZE, False

    def __init__(self) -> None:
        self.heads = {name: len(values) for name, values in ATTRIBUTES.items()}
        scenes: list[Scene] = list(itertools.product(*ATTRIBUTES.values()))  # type: ignore[arg-type]
        random.Random(0).shuffle(scenes)
        held = round(HELD_OUT_SHARE * len(scenes))
        self._splits = {"heldout": scenes[:held], "train": scenes[held:]}
        self._by_caption = {caption(scene): scene for scene in scenes}

    def missing(self) -> str | None:
        return None

    def captions(self, split: str) -> list[str]:
        return [caption(scene) for scene in self._splits[split]]

    def vocabulary(self) -> list[str]:
        return list(self._by_caption)

    def _draw_random(self, scenes: list[Scene], count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        chosen = [scenes[i] for i in rng.integers(len(scenes), size=count)]
        return np.stack([draw(scene, rng) for scene in chosen]), [caption(scene) for scene in chosen]

    def training_images(self, count: int, rng: np.random.Generator, split: str = "train") -> tuple[np.ndarray, list[str]]:
        return self._draw_random(self._splits[split], count, rng)

    def judge_images(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        images, captions = self._draw_random(list(self._by_caption.values()), count, rng)
        return images, self.labels(captions)

    def reference_images(self, captions: list[str]) -> np.ndarray:
        return np.stack([draw(self._by_caption[c]) for c in captions])

    def labels(self, captions: list[str]) -> np.ndarray:
        rows = [
            [ATTRIBUTES[name].index(value) for name, value in zip(ATTRIBUTES, self._by_caption[c], strict=True)]
            for c in captions
        ]
        return np.array(rows, dtype=np.int64)
