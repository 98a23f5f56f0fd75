"""What a world is: captioned images with a held-out split, plus the real renders that judge what is generated."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sdxs.errors import InvalidRequest


class World(Protocol):
    """A captioned image distribution. Images are uint8 RGB, shape (N, H, W, 3)."""

    name: str
    image_size: int
    heads: dict[str, int]  # what the judge classifies: head name -> number of classes
    retrieval: bool  # True: scored by nearest real image; False: by all heads being right

    def missing(self) -> str | None:
        """What training and judge images need and this machine does not have."""
        ...

    def captions(self, split: str) -> list[str]:
        """Captions of "train" or "heldout"; each stands once."""
        ...

    def vocabulary(self) -> list[str]:
        """All text the tokenizer should know, held-out captions included (their words are not held out)."""
        ...

    def training_images(self, count: int, rng: np.random.Generator, split: str = "train") -> tuple[np.ndarray, list[str]]:
        """Random augmented views with their captions."""
        ...

    def judge_images(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random augmented views of all captions, with labels of shape (count, number of heads)."""
        ...

    def reference_images(self, captions: list[str]) -> np.ndarray:
        """The canonical real image of each caption."""
        ...

    def labels(self, captions: list[str]) -> np.ndarray:
        """Head labels of captions, shape (N, number of heads)."""
        ...


def get_world(name: str) -> World:
    """The world of a name.

    Raises:
        InvalidRequest: there is no such world.
    """
    from trainer.worlds.emoji import EmojiWorld
    from trainer.worlds.scenes import ScenesWorld

    worlds: dict[str, type[World]] = {"emoji": EmojiWorld, "scenes": ScenesWorld}
    if name not in worlds:
        raise InvalidRequest("world", name, f"one of {', '.join(worlds)}")
    return worlds[name]()
