"""What the text encoder hands to the U-Net. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Prompts:
    """float32 hidden states of B prompts, L tokens of D numbers, and for SDXL their pooled embeddings."""

    text_BLD: Array
    pooled_BD: Array | None = None

    def rows(self) -> list[Prompts]:
        """Each prompt alone, with B = 1."""
        count = len(self.text_BLD)
        pooled = [None] * count if self.pooled_BD is None else np.split(self.pooled_BD, count)
        return [Prompts(text, one) for text, one in zip(np.split(self.text_BLD, count), pooled, strict=True)]

    @classmethod
    def stack(cls, parts: Sequence[Prompts]) -> Prompts:
        """The prompts of all parts, one after the other."""
        pooled = [part.pooled_BD for part in parts if part.pooled_BD is not None]
        return cls(np.concatenate([part.text_BLD for part in parts]), np.concatenate(pooled) if pooled else None)
