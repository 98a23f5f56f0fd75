"""The judge: a small classifier of real renders, whose features and answers score generated images.

Knows images and labels, not how they were generated. It is trained on real renders only and reported with its own accuracy there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.metrics.frechet import frechet_distance
from trainer.worlds.base import World

FEATURES = 64


class JudgeNet(nn.Module):
    """Four stride-2 convolution stages to a 64-d feature, then one cosine classifier per head."""

    def __init__(self, heads: dict[str, int], width: int = 32) -> None:
        super().__init__()
        self.heads, self.width = dict(heads), width
        channels = [3, width, 2 * width, 3 * width, 4 * width]
        blocks = []
        for low, high in pairwise(channels):
            blocks += [nn.Conv2d(low, high, 3, stride=2, padding=1), nn.GroupNorm(4, high), nn.SiLU()]
            blocks += [nn.Conv2d(high, high, 3, padding=1), nn.GroupNorm(4, high), nn.SiLU()]
        self.trunk = nn.Sequential(*blocks)
        self.project = nn.Linear(channels[-1] * 16, FEATURES)
        self.prototypes = nn.ParameterDict({name: nn.Parameter(torch.randn(n, FEATURES)) for name, n in heads.items()})

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Features of images in [-1, 1], shape (B, 64); not normalised."""
        maps_BCHW = F.adaptive_avg_pool2d(self.trunk(image_BCHW), 4)
        features: Tensor = self.project(maps_BCHW.flatten(1))
        return features

    def logits(self, features_BF: Tensor) -> dict[str, Tensor]:
        """Cosine similarity to each class, times 16, per head."""
        unit_BF = F.normalize(features_BF, dim=-1)
        return {name: 16 * unit_BF @ F.normalize(p, dim=-1).T for name, p in self.prototypes.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "judge.safetensors")
        (folder / "config.json").write_text(json.dumps({"heads": self.heads, "width": self.width}))

    @classmethod
    def load(cls, folder: Path) -> JudgeNet:
        net = cls(**json.loads((folder / "config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
        return net.eval()


def to_tensor(image_BHWC: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image_BHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1


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
        """As `trainer.metrics.base.ImageFeatures` has it."""
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
