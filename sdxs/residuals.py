"""What ControlNets add to a U-Net. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Residuals:
    """float32 arrays of B images, each (B, C, h, w): the down residuals in diffusers' order, the mid one last."""

    parts: tuple[Array, ...]

    def rows(self) -> list[Residuals]:
        """Each image alone, with B = 1."""
        count = len(self.parts[0])
        return [Residuals(tuple(part[i : i + 1] for part in self.parts)) for i in range(count)]

    @classmethod
    def stack(cls, parts: Sequence[Residuals | None], like: Residuals) -> Residuals:
        """The images of all parts, one after the other; None stands for one image without: zeros."""
        zeros = Residuals(tuple(np.zeros((1, *part.shape[1:]), part.dtype) for part in like.parts))
        rows = [part or zeros for part in parts]
        return cls(tuple(np.concatenate(each) for each in zip(*(row.parts for row in rows), strict=True)))

    def __add__(self, other: Residuals) -> Residuals:
        """Of two ControlNets on the same images."""
        return Residuals(tuple(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def weighted(self, weights: Array) -> Residuals:
        """Times a number per image, (B,), or per image and part, (B, R)."""
        per_part = weights.T if weights.ndim == 2 else [weights] * len(self.parts)
        return Residuals(
            tuple(part * np.asarray(w, np.float32)[:, None, None, None] for part, w in zip(self.parts, per_part, strict=True))
        )
