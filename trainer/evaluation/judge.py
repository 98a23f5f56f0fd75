"""The judge: a small classifier of real renders, whose features and answers score generated images.

Knows images and labels, not how they were generated. It is trained on real renders only and reported with its own accuracy there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from trainer.evaluation.metrics.frechet import frechet_distance
from trainer.models.judge import JudgeNet, to_tensor
from trainer.worlds.base import World


@dataclass(frozen=True)
class Scores:
    """top1/top5: shares in [0, 1] (top5 is None where the world is scored by attributes); frechet: feature-space distance."""

    top1: float
    top5: float | None
    frechet: float


class Judge:
    """Scores images against the captions they were asked for. `accuracy` is its own, on real renders it was not trained on."""

    def __init__(self, net: JudgeNet, world: World, accuracy: float) -> None:
        self.net, self.world, self.accuracy = net, world, accuracy

    @property
    def name(self) -> str:
        """As `trainer.evaluation.metrics.base.ImageFeatures` has it."""
        return "judge"

    @torch.no_grad()
    def features(self, image_BHWC: np.ndarray) -> np.ndarray:
        """float64 features, shape (N, 64)."""
        parts = [self.net.features(part) for part in to_tensor(image_BHWC).split(128)]
        return torch.cat(parts).double().numpy()

    @torch.no_grad()
    def logits(self, image_BHWC: np.ndarray) -> dict[str, np.ndarray]:
        """What it answers, per head, shape (N, classes)."""
        features_NF = torch.from_numpy(self.features(image_BHWC)).float()
        return {head: values.numpy() for head, values in self.net.logits(features_NF).items()}

    @cached_property
    def _gallery(self) -> tuple[list[str], np.ndarray]:
        """Every caption of the world, and the feature direction of its real image."""
        captions = [c for split in ("train", "heldout") for c in self.world.captions(split)]
        gallery_NF = self.features(self.world.reference_images(captions))
        return captions, gallery_NF / np.linalg.norm(gallery_NF, axis=1, keepdims=True)

    @torch.no_grad()
    def score(self, image_BHWC: np.ndarray, captions: list[str]) -> Scores:
        """Top-1/top-5 retrieval among all real emoji (or all attributes right), and Frechet distance to the captions' real images."""
        features_NF = self.features(image_BHWC)
        frechet = frechet_distance(features_NF, self.features(self.world.reference_images(captions)))
        labels = self.world.labels(captions)
        if not self.world.retrieval:
            logits = self.logits(image_BHWC)
            right = np.stack([logits[h].argmax(-1) == labels[:, i] for i, h in enumerate(self.world.heads)])
            return Scores(float(right.all(0).mean()), None, frechet)
        everything, gallery_NF = self._gallery
        similarity = features_NF @ gallery_NF.T
        own = np.array([everything.index(c) for c in captions])
        rank = (similarity > similarity[np.arange(len(own)), own][:, None]).sum(1)
        return Scores(float((rank == 0).mean()), float((rank < 5).mean()), frechet)
