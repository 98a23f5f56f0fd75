"""What a U-Net is conditioned on besides the timestep: the prompt's hidden states and, for SDXL, its pooled embedding and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Conditioning:
    """Of B prompts. `pooled_BD` and `time_ids_B6` (original size, crop, target size; arXiv:2307.01952) are SDXL's, both or neither."""

    text_BLD: Tensor
    pooled_BD: Tensor | None = None
    time_ids_B6: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.pooled_BD is None) != (self.time_ids_B6 is None):
            raise ValueError("pooled_BD and time_ids_B6 belong together: SDXL has both, SD 1.x and 2.x neither")

    def __len__(self) -> int:
        return len(self.text_BLD)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' UNet2DConditionModel."""
        if self.pooled_BD is None:
            return {"encoder_hidden_states": self.text_BLD}
        added = {"text_embeds": self.pooled_BD, "time_ids": self.time_ids_B6}
        return {"encoder_hidden_states": self.text_BLD, "added_cond_kwargs": added}

    def to(self, target: torch.device | torch.dtype | str) -> Conditioning:
        """On another device or in another floating point type."""
        return self._map(lambda part: part.to(target))

    def rows(self, index: slice | Tensor) -> Conditioning:
        """Some of the prompts."""
        return self._map(lambda part: part[index])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled, sizes = (None if part is None else change(part) for part in (self.pooled_BD, self.time_ids_B6))
        return Conditioning(change(self.text_BLD), pooled, sizes)


def guidance_embedding(weight: float, width: int, device: torch.device | str = "cpu") -> Tensor:
    """What an LCM's U-Net is told of the guidance (its `timestep_cond`), shape (1, width): [sin(1000 w f), cos(1000 w f)] with
    frequencies f from 1 to 1/10000, as of a timestep (arXiv:2310.04378, section 4.3). With w = 0 the output is conditional only."""
    half = width // 2
    angle = 1000 * weight * torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / (half - 1)))
    return F.pad(torch.cat([angle.sin(), angle.cos()]), (0, width % 2))[None]


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The prompts of all parts, one after the other."""

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    text_BLD = torch.cat([part.text_BLD for part in parts])
    return Conditioning(text_BLD, joined("pooled_BD"), joined("time_ids_B6"))
