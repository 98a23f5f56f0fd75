"""The usual networks, where someone names them; and the scores of a set of images in any network's eyes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer.evaluation.metrics.base import ImageFeatures
from trainer.evaluation.metrics.clip import ClipFeatures
from trainer.evaluation.metrics.frechet import frechet_distance
from trainer.evaluation.metrics.inception import InceptionFeatures
from trainer.evaluation.metrics.kernel import kernel_distance
from trainer.evaluation.metrics.manifold import NEIGHBOURS, precision_recall


@dataclass(frozen=True)
class Networks:
    """Those that were given; neither is needed where a world has a judge."""

    inception: InceptionFeatures | None = None
    clip: ClipFeatures | None = None

    @classmethod
    def open(cls, inception: str | None, clip: str | None, device: torch.device | str = "cpu") -> Networks:
        """Raises NotFound, PreconditionFailed, InvalidRequest: what is missing, and where it is to be had."""
        return cls(
            InceptionFeatures(Path(inception), device) if inception else None, ClipFeatures(clip, device) if clip else None
        )

    def all(self) -> list[ImageFeatures]:
        """In the order of the columns."""
        return [network for network in (self.inception, self.clip) if network is not None]


def distribution_scores(network: ImageFeatures, real_NF: np.ndarray, made_NF: np.ndarray) -> dict[str, float]:
    """Distances of what was made to what is real for the same captions, in the same order; `frechet_<network>` and so on.

    Without what too few images do not allow.
    """
    name, fewest = network.name.lower(), min(len(real_NF), len(made_NF))
    found: dict[str, float] = {}
    if fewest > 1:
        found[f"frechet_{name}"] = frechet_distance(real_NF, made_NF)
        found[f"kid_{name}"] = kernel_distance(real_NF, made_NF, paired=True)[0]
    if fewest > NEIGHBOURS:
        found[f"precision_{name}"], found[f"recall_{name}"] = precision_recall(real_NF, made_NF)
    return {key: round(value, 5) for key, value in found.items()}
