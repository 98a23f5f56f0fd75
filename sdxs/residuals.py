"""What ControlNets add to a U-Net. No torch, but for residuals that are torch's already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Part = Any  # np.ndarray or torch.Tensor


@dataclass(frozen=True)
class Residuals:
    """Arrays of B images, each (B, C, h, w): the down residuals in diffusers' order, the mid one last.

    In the host's memory float32 of numpy; on a device tensors of torch, float32 or the network's own type. All of one kind.
    """

    parts: tuple[Part, ...]

    @property
    def on_host(self) -> bool:
        """Whether they are numpy's."""
        return isinstance(self.parts[0], np.ndarray)

    def host(self) -> Residuals:
        """In the host's memory, float32; themselves when they are there already."""
        if self.on_host:
            return self
        return Residuals(tuple(part.float().contiguous().cpu().numpy() for part in self.parts))

    def beside(self, other: Residuals) -> Residuals:
        """On the device of others and in their type. For numpy's beside torch's, and those that are alike."""
        if self.on_host == other.on_host:
            return self
        return Residuals(tuple(there.new_tensor(part) for part, there in zip(self.parts, other.parts, strict=True)))

    def rows(self) -> list[Residuals]:
        """Each image alone, with B = 1."""
        count = len(self.parts[0])
        return [Residuals(tuple(part[i : i + 1] for part in self.parts)) for i in range(count)]

    def spread(self, shapes: Sequence[Sequence[int]]) -> Residuals:
        """Of those shapes, (C, h, w) each: what is the same everywhere, (B, C, 1, 1), is repeated."""
        return Residuals(tuple(_spread(part, (len(part), *shape)) for part, shape in zip(self.parts, shapes, strict=True)))

    @classmethod
    def stack(cls, parts: Sequence[Residuals | None], like: Residuals) -> Residuals:
        """The images of all parts, one after the other; None stands for one image without: zeros."""
        zeros = Residuals(tuple(_zeros((1, *part.shape[1:]), part) for part in like.parts))
        rows = [part or zeros for part in parts]
        return cls(tuple(map(_joined, zip(*(row.parts for row in rows), strict=True))))

    def __add__(self, other: Residuals) -> Residuals:
        """Of two ControlNets on the same images."""
        return Residuals(tuple(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def weighted(self, weights: Array) -> Residuals:
        """Times a number per image, (B,), or per image and part, (B, R)."""
        per_part = weights.T if weights.ndim == 2 else [weights] * len(self.parts)
        return Residuals(tuple(_times(part, w) for part, w in zip(self.parts, per_part, strict=True)))


def _times(part: Part, weights_B: Array) -> Part:
    weights_B111 = np.asarray(weights_B, np.float32)[:, None, None, None]
    return part * (weights_B111 if isinstance(part, np.ndarray) else part.new_tensor(weights_B111))


def _zeros(shape: Sequence[int], like: Part) -> Part:
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def _spread(part: Part, shape: Sequence[int]) -> Part:
    return np.broadcast_to(part, shape) if isinstance(part, np.ndarray) else part.expand(shape)


def _joined(parts: Sequence[Part]) -> Part:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat(tuple(parts))
